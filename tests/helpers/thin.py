"""Torchvision's networks with few channels: the same code, and the same depth if convolutional, in little time."""

import importlib

import torch
import torchvision
from networks import randomise
from torch import nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from saltern.pipeline.models.pools import use_even_pools

_NO_HEADS = {"aux_logits": False, "init_weights": False}  # those that serve training

# Networks of torchvision's classes, with few and narrow layers.
_SMALL = {
    "small_vit": lambda: VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128),
    "tiny_vit": lambda: VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32),
    "small_swin": lambda: SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7]),
    "small_convnext": lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]),
    "small_maxvit": lambda: MaxVit((224, 224), 8, 7, [8, 16], [1, 1], 4, 0.0),
    "regnet_x_400mf": torchvision.models.regnet_x_400mf,
}
_SIDES = {"small_vit": 64, "tiny_vit": 64, "small_maxvit": 224}  # of the images that a method is built with, pixels


def few_channels(name: str) -> nn.Module:
    """Return a small network, or torchvision's of the name made thin, with random weights that depend on the name."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(_SMALL[name]()) if name in _SMALL else thin(name, 8 if name == "vgg16_bn" else 4)
    model.image_size = _SIDES.get(name, 96)
    return model


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
