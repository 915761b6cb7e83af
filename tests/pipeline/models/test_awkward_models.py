"""timm's models with odd heads, presets and sizes, and a network of one size: right, or refused with the fix."""

import re

import making
import pytest
import timm
import torch

from saltern.pipeline.methods import build
from saltern.pipeline.models.classifiers import load
from saltern.pipeline.models.grids import check_layers
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow


def test_a_backbone_without_head_is_refused():
    with pytest.raises(UserError, match="no classifier head"):
        load("timm:eva02_tiny_patch14_224.mim_in22k", "none")


def test_weights_that_squash_have_a_preset_that_squashes():
    preprocess = load("timm:convnextv2_nano.fcmae_ft_in22k_in1k_384", "none").preprocess
    assert (preprocess.squash, preprocess.crop, preprocess.interpolation) == (True, 384, "bicubic")


def test_the_default_layer_of_a_map_pooled_transformer_is_a_grid_or_is_refused_with_those_that_are():
    """Its last output of four dimensions is (batch, heads, tokens, dimension), as in SigLIP."""
    torch.manual_seed(0)
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", **size, global_pool="map", class_token=False, num_classes=5).eval()
    method = build("grad-cam", net, input_side=64)
    if "attn_pool" in method.layer[0]:
        with pytest.raises(UserError, match="no grid of the image at 64 x 64 pixels") as refused:
            check_layers(net, method.layer, 64)
        fitting = re.search(r"layers that fit: (.*) \(", str(refused.value))[1].split(", ")
        method = build("grad-cam", net, input_side=64, layer=fitting[0])
    check_layers(net, method.layer, 64)
    assert method(torch.randn(2, 3, 64, 64)).shape == (2, 8, 8)


def test_a_transformer_of_one_size_has_its_default_layer_at_the_runs_size():
    torch.manual_seed(0)
    size = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
    net = timm.create_model("swinv2_tiny_window8_256", **size, num_classes=5).eval()
    method = build("grad-cam", net, input_side=64)
    check_layers(net, method.layer, 64)
    assert method(torch.randn(2, 3, 64, 64)).shape == (2, 8, 8)
    with pytest.raises(UserError, match="fails on images of 224 x 224") as refused:
        build("grad-cam", net)
    assert "\n" not in str(refused.value)


class Only64(making.Tiny):
    def forward(self, x_BCHW):
        if x_BCHW.shape[2] != 64:
            raise ValueError("64 pixels only")
        return super().forward(x_BCHW)


def test_cam_finds_head_and_layer_of_a_network_for_64_pixels_only():
    net = Only64().eval()
    assert build("cam", net, input_side=64)(torch.randn(2, 3, 64, 64)).shape == (2, 8, 8)
    with pytest.raises(UserError, match=r"fails on images of 224 x 224 .*give the size that it takes"):
        build("cam", net)
