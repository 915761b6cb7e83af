"""Grids of layers: they follow a patch that moves in the image, at the run's own size, or are refused."""

import making
import pytest
import torch
from odd_models import Attention, Turned

from saltern.pipeline.methods import build
from saltern.pipeline.models.classifiers import load
from saltern.pipeline.models.grids import check_layers, fitting_layers
from saltern.schemas.errors import UserError


@pytest.mark.parametrize(("layer", "fits"), [("conv", True), ("turned", False), ("tokens", False)])
def test_rows_and_columns_and_the_order_of_tokens_must_be_those_of_the_image(layer, fits):
    torch.manual_seed(0)
    model = Turned().eval()
    if fits:
        check_layers(model, [layer], 32)
    else:
        with pytest.raises(UserError, match=rf"{layer}.*4 x 4 cells that do not follow.*layers that fit: conv"):
            check_layers(model, [layer], 32)
    assert fitting_layers(model, 32) == ["conv"]


def test_four_dimensions_of_attention_are_no_grid():
    torch.manual_seed(0)
    model = Attention().eval()
    with pytest.raises(UserError, match=r"'split' gives 16 x 16 cells that do not follow.*layers that fit: patches"):
        check_layers(model, ["split"], 32)
    with pytest.raises(UserError, match=r"'split' gives 64 x 16 cells, which are no grid of the image"):
        check_layers(model, ["split"], 64)


@pytest.mark.slow
def test_one_cell_has_no_mask_and_the_layers_that_have_more_are_named():
    model = load("resnet18", "none").model
    with pytest.raises(
        UserError,
        match=r"'layer4' has a grid of 1 x 1 cell, .* at 32 x 32 pixels; .*fit: .*layer3 \(give one as --layer",
    ):
        check_layers(model, ["layer4"], 32)
    with pytest.raises(UserError, match="'avgpool' has a grid of 1 x 1 cell"):
        check_layers(model, ["avgpool"], 64)
    with pytest.raises(UserError, match=r"'fc' gives \(4, 1000\), which is no grid"):
        check_layers(model, ["fc"], 64)
    check_layers(model, ["layer4"], 64)


def test_the_default_layer_is_found_at_the_runs_own_size():
    class Fixed(making.Tiny):
        def forward(self, x_BCHW):
            assert x_BCHW.shape[2] == 48
            return super().forward(x_BCHW)

    with build("grad-cam", Fixed(), input_side=48) as method:
        assert method.layer == ["body"]
    with pytest.raises(UserError, match="fails on images of 224 x 224"):
        build("grad-cam", Fixed())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_b_32", "swin_t", "convnext_tiny", "densenet121", "maxvit_t"])
def test_default_layers_of_torchvision_fit(name):
    made = load(name, "none")
    side = made.preprocess.crop
    check_layers(made.model, build("grad-cam", made.model, input_side=side).layer, side)
