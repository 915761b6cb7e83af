"""Grad-CAM against captum's and pytorch-grad-cam's raw maps (before their scaling), CAM against Grad-CAM."""

import captum.attr
import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from pipeline.methods import build
from pipeline.methods.layers import _last_grid, default_layer
from pipeline.methods.taps import Taps, _token_grid
from schemas.errors import UserError

# Model, side of the input, layer (None = default), grid of the map.
CONVOLUTIONAL = [
    ("resnet18", 96, None, 3),
    ("resnet18", 96, "layer2", 12),
    ("resnet18", 96, "layer4.0.conv2", 3),
    ("vgg16_bn", 64, None, 4),
    ("vgg16_bn", 64, "features.43", 2),
    ("densenet121", 96, "features.denseblock4", 3),
    ("mobilenet_v2", 96, None, 3),
    ("googlenet", 96, None, 3),
    ("efficientnet_lite0", 96, "_blocks.14", 3),
]
TARGET = torch.tensor([7, 500, 7])


def close(found, expected):
    scale = float(expected.abs().max())
    assert scale > 0
    assert expected.std() > 1e-3 * scale  # a constant map would agree with too much
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


def reference(model, layer, x, reshape=None):
    """pytorch-grad-cam's map on the layer's grid: its weighted sum and ReLU, without its min-max scaling and resize."""
    target = [ClassifierOutputTarget(int(c)) for c in TARGET]
    with GradCAM(model, [layer], reshape_transform=reshape) as cam:
        cam(x, target)
        A, G = (
            held[0].numpy() for held in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
        )
        raw = cam.get_cam_image(x, layer, target, A, G, False)
    model.zero_grad(set_to_none=True)
    return torch.from_numpy(np.maximum(raw, 0))


@pytest.mark.parametrize(("name", "side", "layer", "grid"), CONVOLUTIONAL)
def test_grad_cam_equals_the_published_libraries(name, side, layer, grid, network, images):
    model, x = network(name), images(3, side)
    with build("grad-cam", model, layer=layer) as method:
        found = method(x, TARGET)
        target_layer = model.get_submodule(method.layer[0])
    assert found.shape == (3, grid, grid)
    close(found, reference(model, target_layer, x))
    theirs = captum.attr.LayerGradCam(model, target_layer).attribute(x, TARGET, relu_attributions=True)
    close(found, theirs[:, 0].detach())


def test_grad_cam_on_densenets_last_stage_takes_the_activation_before_the_functional_relu(network, images):
    # pytorch-grad-cam reads this activation after the in-place ReLU has changed it; captum copies it before, as we do.
    model, x = network("densenet121"), images(3, 96)
    found = build("grad-cam", model)(x, TARGET)
    theirs = captum.attr.LayerGradCam(model, model.features).attribute(x, TARGET, relu_attributions=True)
    close(found, theirs[:, 0].detach())


def test_grad_cam_on_vit_leaves_the_class_token_out(network, images):
    model, x = network("vit_b_16"), images(3, 224)
    with build("grad-cam", model) as method:
        found = method(x, TARGET)
        assert method.layer == ["encoder.layers.encoder_layer_11.ln_1"]

    def reshape(tokens_BTK):
        return tokens_BTK[:, 1:].reshape(len(tokens_BTK), 14, 14, -1).permute(0, 3, 1, 2)

    close(found, reference(model, model.encoder.layers[-1].ln_1, x, reshape))


@pytest.mark.parametrize("layer", ["norm", "features.7.1.norm1", "features.5"])
def test_grad_cam_on_swin_reads_channels_last(layer, network, images):
    model, x = network("swin_t"), images(3, 96)
    found = build("grad-cam", model, layer=layer)(x, TARGET)
    theirs = reference(model, model.get_submodule(layer), x, lambda out: out.permute(0, 3, 1, 2))
    close(found, theirs)


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 96), ("mobilenet_v2", 96), ("googlenet", 96), ("efficientnet_lite0", 96), ("swin_t", 96)],
)
def test_relu_of_cam_is_hw_times_grad_cam(name, side, network, images):
    model, x = network(name), images(3, side)
    with build("cam", model) as cam, build("grad-cam", model) as grad_cam:
        signed, found = cam(x, TARGET), grad_cam(x, TARGET)
        assert cam.layer == grad_cam.layer
    assert signed.min() < 0
    close(signed.relu(), found[0].numel() * found)


def test_mean_of_cam_plus_bias_is_the_logit(network, images):
    # DenseNet's activation is rectified by a functional ReLU: no layer gives it, so Grad-CAM cannot serve as reference.
    for name in ("densenet121", "resnet18"):
        model, x = network(name), images(3, 96)
        with build("cam", model) as method:
            found = method(x, TARGET)
            logit = method.last.logits_BK.gather(1, TARGET[:, None])[:, 0]
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        torch.testing.assert_close(found.mean((1, 2)) + head.bias[TARGET], logit, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vgg16_bn", "vit_b_16", "convnext_tiny", "squeezenet1_1", "mobilenet_v3_small"])
def test_cam_refuses_a_network_without_a_linear_head_after_pooling(name, network):
    with pytest.raises(UserError, match="global average pooling"):
        build("cam", network(name))


def test_cam_refuses_a_head_that_tells_nothing(tiny):
    nn.init.zeros_(tiny.fc.weight)
    with pytest.raises(UserError, match="global average pooling"):
        build("cam", tiny)


@pytest.mark.parametrize(
    ("name", "layer", "seen"),
    [
        # `seen`: the last grid that a probe of the running model shows; where the default departs from it, on purpose.
        ("resnet18", "layer4", "layer4"),
        ("densenet121", "features", "features"),
        ("googlenet", "inception5b", "inception5b"),
        ("inception_v3", "Mixed_7c", "Mixed_7c"),
        ("mobilenet_v2", "features", "features"),
        ("mobilenet_v3_small", "features", "features"),
        ("efficientnet_b0", "features", "features"),
        ("regnet_x_400mf", "trunk_output", "trunk_output"),
        ("shufflenet_v2_x0_5", "conv5", "conv5"),
        ("mnasnet0_5", "layers", "layers"),
        ("convnext_tiny", "features", "features"),
        ("maxvit_t", "blocks.3", "blocks.3"),
        ("efficientnet_lite0", "_swish", "_swish"),
        ("vgg16_bn", "features.42", "avgpool"),  # before the last max pooling
        ("squeezenet1_1", "features", "classifier.2"),  # before the convolutional head
        ("swin_t", "norm", "permute"),  # the same, channels last
    ],
)
def test_default_layer_is_the_last_stage(name, layer, seen, network):
    model = network(name)
    assert default_layer(model) == layer
    assert _last_grid(model, dict(model.named_modules())) == seen


def test_models_that_no_table_knows_are_probed(tiny, images):
    assert default_layer(tiny) == "stage2"
    for wrong, said in ((nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), "fails on a 224"), (nn.Flatten(), "no layer")):
        with pytest.raises(UserError, match=said):
            default_layer(wrong)


def test_token_grids():
    assert _token_grid(196, (224, 224)) == (14, 14)
    assert _token_grid(197, (224, 224)) == (14, 14)
    assert _token_grid(261, (224, 224)) == (16, 16)  # a class token and four registers
    assert _token_grid(14 * 20 + 1, (224, 320)) == (14, 20)
    assert _token_grid(20 * 14 + 1, (320, 224)) == (20, 14)
    assert _token_grid(1000, (224, 224)) is None


def test_tokens_keep_their_places():
    taps = Taps(nn.Sequential(nn.Identity()), ["0"])
    tokens = torch.arange(1 + 2 * 3).float().reshape(1, 7, 1)
    assert taps.grid(0, tokens, (32, 48)).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]
    channels_last = torch.arange(4 * 6 * 16).float().reshape(1, 4, 6, 16)
    torch.testing.assert_close(taps.grid(0, channels_last, (32, 48)), channels_last.permute(0, 3, 1, 2))
    channels_first = torch.arange(16 * 4 * 6).float().reshape(1, 16, 4, 6)
    torch.testing.assert_close(taps.grid(0, channels_first, (32, 48)), channels_first)
    with pytest.raises(UserError, match="no grid"):
        taps.grid(0, torch.zeros(1, 1000, 4), (32, 32))


def test_swin_is_channels_last_even_where_the_shape_could_be_either(network):
    # At 384 pixels swin_t's first stage gives 96 x 96 tokens of 96 channels.
    cube = torch.arange(96**3).float().reshape(1, 96, 96, 96)
    found = Taps(network("swin_t"), ["features.1"]).grid(0, cube, (384, 384))
    assert torch.equal(found, cube.permute(0, 3, 1, 2))
