"""Torchvision's convolutional networks with a share of their channels: the same code and depth, in little time."""

import importlib

import torch
import torchvision
from networks import randomise
from torch import nn

from saltern.pipeline.models.pools import use_even_pools

_NO_HEADS = {"aux_logits": False, "init_weights": False}  # those that serve training


def thin(name: str, share: int = 4, **options: int) -> nn.Module:
    """Return a network of torchvision, or an efficientnet_lite, with one of `share` channels; random, in eval mode.

    Args:
        options: of torchvision's builder.
    """
    with torch.device("meta"):  # the weights of all channels are never made
        if name.startswith("efficientnet_lite"):
            lite = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            model = lite.from_name(name.replace("_", "-"))
        else:
            heads = _NO_HEADS if name in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(name, weights=None, **(heads | options))
    *_, head = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _thin_convolution(module, share, module is head)
        elif isinstance(module, nn.Linear):
            made = nn.Linear(module.in_features // share, module.out_features // (1 if module is head else share))
            module.__dict__.update(made.__dict__)
        elif isinstance(module, nn.BatchNorm2d):
            made = nn.BatchNorm2d(_fewer(module.num_features, share), eps=module.eps)
            module.__dict__.update(made.__dict__)
    use_even_pools(model)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    return randomise(model)


def _fewer(channels: int, share: int) -> int:
    return max(channels // share, 1)


def _thin_convolution(module: nn.Conv2d, share: int, is_head: bool) -> None:
    inside = module.in_channels if module.in_channels == 3 else _fewer(module.in_channels, share)
    groups = inside if module.groups == module.in_channels else module.groups
    module.out_channels = module.out_channels if is_head else _fewer(module.out_channels, share)
    module.in_channels, module.groups = inside, groups
    weight = torch.empty(module.out_channels, inside // groups, *module.kernel_size)
    nn.init.kaiming_normal_(weight, mode="fan_out" if groups == 1 else "fan_in", nonlinearity="relu")
    module.weight = nn.Parameter(weight)
    if module.bias is not None:
        module.bias = nn.Parameter(torch.zeros(module.out_channels))
