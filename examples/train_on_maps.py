"""Train a small network to predict a run's masks from its images.

python train_on_maps.py RUN [EPOCHS]

The dataset joins the run with the shards that it was made from. Image and mask align pixel for pixel.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import saltern


def segmenter() -> nn.Module:
    """Return a network from (B, 3, H, W) to mask logits (B, 1, H / 4, W / 4)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(32, 1, 5, padding=2),
    )


def main(path: str, epochs: int = 5) -> list[float]:
    """Return the mean loss of each epoch."""
    torch.manual_seed(0)
    dataset = saltern.SaliencyDataset(path, shuffle=True)
    loader = DataLoader(dataset, batch_size=8)
    net = segmenter()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    history = []
    for epoch in range(epochs):
        losses = []
        for batch in loader:
            x_BCHW = (batch["image"] / 255 - dataset.mean) / dataset.std
            logits_B1hw = net(x_BCHW)
            share_B1hw = F.adaptive_avg_pool2d(batch["mask"].float()[:, None], logits_B1hw.shape[2:])
            loss = F.binary_cross_entropy_with_logits(logits_B1hw, share_B1hw)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        history.append(sum(losses) / len(losses))
        print(f"epoch {epoch}: loss {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
