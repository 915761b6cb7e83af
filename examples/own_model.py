"""A model of your own: a function without arguments that returns a torch module.

saltern extract SHARDS --out RUN --model own_model:small_net --method grad-cam --target top1

Start the command in this folder, or put the folder on PYTHONPATH. Without --weights FILE the factory's own weights
count, so seed them: a run refuses to resume with other weights, and so do workers that load others.
"""

import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Ten classes; three stages, global average pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=4, padding=3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, 10), without a softmax."""
        logits_BK: Tensor = self.head(self.stages(x_BCHW).mean((2, 3)))
        return logits_BK


def small_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallNet()
