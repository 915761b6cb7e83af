"""The default layers of today's model families, at two sizes, one of them not square if the family takes it."""

import pytest
import timm
import torch
import torchvision
from torchvision.models import ConvNeXt, MaxVit, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from saltern.pipeline.methods import build
from saltern.pipeline.models.grids import check_layers
from saltern.pipeline.models.layers import default_layer

pytestmark = pytest.mark.slow
_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}  # few and narrow layers; the structure is the family's
_STAGES = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "embed_dim": 24}


def _timm(name, image=True, **options):
    """Return the function that builds a model of timm for images of a size."""
    return lambda shape: timm.create_model(name, num_classes=5, **options, **({"img_size": shape} if image else {}))


def _maxvit(shape):
    return MaxVit(shape, 16, 1, [16, 16, 32, 32], [1, 1, 1, 1], 8, 0.0, num_classes=5)


def _swin(shape, **more):
    return SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5, **more)


def _convnext(shape):
    return ConvNeXt([CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)], num_classes=5)


def _torchvision(name):
    return lambda shape: getattr(torchvision.models, name)(weights=None, num_classes=5)


# Family, function that builds it, two sizes (height, width), default layer, pixels of a cell.
FAMILIES = {
    "swin": (_swin, [(64, 64), (64, 96)], "norm", 8),
    "convnext": (_convnext, [(64, 64), (96, 64)], "features", 8),
    "maxvit": (_maxvit, [(64, 64), (128, 128)], "blocks.3", 32),
    "efficientnet-v2": (_torchvision("efficientnet_v2_s"), [(96, 96), (96, 64)], "features", 32),
    "regnet-x": (_torchvision("regnet_x_400mf"), [(96, 96), (96, 64)], "trunk_output", 32),
    "regnet-y": (_torchvision("regnet_y_400mf"), [(96, 96), (64, 96)], "trunk_output", 32),
    "vit": (
        lambda shape: VisionTransformer(shape[0], 16, 2, 2, 64, 128, num_classes=5),
        [(64, 64), (96, 96)],
        "encoder.layers.encoder_layer_1.ln_1",
        16,
    ),
    "timm swin": (
        _timm("swin_tiny_patch4_window7_224", window_size=4, **_STAGES), [(64, 64), (128, 64)], "norm", 32
    ),
    "timm swin-v2": (
        _timm("swinv2_tiny_window8_256", window_size=4, **_STAGES), [(64, 64), (64, 128)], "norm", 32
    ),
    "timm convnext": (_timm("convnext_atto", image=False), [(64, 64), (96, 64)], "norm_pre", 32),
    "timm convnext-v2": (_timm("convnextv2_atto", image=False), [(64, 64), (64, 96)], "norm_pre", 32),
    "timm maxvit": (_timm("maxvit_pico_rw_256"), [(128, 128), (128, 64)], "norm", 32),
    "timm efficientnet-v2": (_timm("tf_efficientnetv2_b0", image=False), [(96, 96), (96, 64)], "bn2", 32),
    "timm regnet": (_timm("regnety_002", image=False), [(96, 96), (96, 160)], "final_conv", 32),
    "timm deit": (_timm("deit_tiny_patch16_224", **_VIT), [(64, 64), (96, 64)], "blocks.1.norm1", 16),
    "timm deit distilled": (
        _timm("deit_tiny_distilled_patch16_224", **_VIT), [(64, 64), (64, 96)], "blocks.1.norm1", 16
    ),
    "timm dinov2": (_timm("vit_small_patch14_dinov2", **_VIT), [(56, 56), (84, 56)], "blocks.1.norm1", 14),
    "timm dinov2 with registers": (
        _timm("vit_small_patch14_reg4_dinov2", **_VIT), [(56, 56), (56, 84)], "blocks.1.norm1", 14
    ),
    "timm dinov3": (_timm("vit_tiny_patch16_dinov3_qkvb", **_VIT), [(64, 64), (96, 64)], "blocks.1.norm1", 16),
    # Its attention over the patches at the end has outputs of four dimensions, which are no grid.
    "timm siglip": (_timm("vit_base_patch16_siglip_224", **_VIT), [(64, 64), (96, 64)], "blocks.1.norm1", 16),
}  # fmt: skip
CASES = [(family, shape) for family, (_, shapes, *_) in FAMILIES.items() for shape in shapes]


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_the_default_layer_lies_over_the_image(family, shape):
    make, _, layer, cell = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(shape).eval()  # deep networks with random BatchNorm do not follow a patch
    side = shape[0] if shape[0] == shape[1] else shape
    assert default_layer(model, side) == layer
    check_layers(model, [layer], side)
    x = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(1))
    with build("grad-cam", model, input_side=side) as method:
        assert method.layer == [layer]
        assert method(x, torch.tensor([int(model(x).argmax())])).shape == (1, shape[0] // cell, shape[1] // cell)
