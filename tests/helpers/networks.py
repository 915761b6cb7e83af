"""Networks with random weights that show errors which freshly initialised ones would hide."""

import torch
from torch import nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise BatchNorm, else the identity in eval mode, and zero heads, which would give zero gradients."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2, generator=draw)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=draw)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=draw)
            nn.init.normal_(module.bias, 0, 0.2, generator=draw)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, module.in_features**-0.5, generator=draw)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1, generator=draw)
    return model.eval()
