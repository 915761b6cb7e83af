"""The CAMs of one pass against captum's and pytorch-grad-cam's raw maps, before their scaling; CAM against Grad-CAM."""

import copy

import captum.attr
import numpy as np
import pytest
import pytorch_grad_cam as theirs
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from references import agree, likely
from torch import nn

from saltern.pipeline.methods import build
from saltern.pipeline.models.layers import _last_grid, default_layer
from saltern.pipeline.models.taps import Taps, token_grid
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
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


PEERS = {
    "grad-cam": theirs.GradCAM,
    "grad-cam++": theirs.GradCAMPlusPlus,
    "layer-cam": theirs.LayerCAM,
    "hires-cam": theirs.HiResCAM,
    "xgrad-cam": theirs.XGradCAM,
    "eigen-cam": theirs.EigenCAM,
}
NEW = [name for name in PEERS if name != "grad-cam"]


@pytest.fixture(autouse=True)
def _thin_svd(monkeypatch):
    """pytorch-grad-cam asks for all 2048 singular vectors, in seconds, and uses the first."""
    whole = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda matrix, full_matrices: whole(matrix, full_matrices=False))


def reference(model, layers, x, reshape=None, name="grad-cam", target=TARGET):
    """pytorch-grad-cam's maps on the layers' grids: its weighted sums, without its min-max scaling and resize.

    Of eigen-cam without its ReLU too; the sign is as it happens.
    """
    target = [ClassifierOutputTarget(int(c)) for c in target]
    with PEERS[name](model, layers, reshape_transform=reshape) as cam:
        cam(x, target)
        A, G = (
            [kept.numpy() for kept in held]
            for held in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
        )
        G = G or [None] * len(A)  # eigen-cam takes none
        raw = [cam.get_cam_image(x, layer, target, a, g, False) for layer, a, g in zip(layers, A, G, strict=True)]
    model.zero_grad(set_to_none=True)
    if name == "eigen-cam":
        return [torch.from_numpy(one) for one in raw]
    return [torch.from_numpy(np.maximum(one, 0)) for one in raw]


def rectified_agree(found, expected, name, network_name, rtol=1e-4):
    """Maps that are zero after the ReLU are zero in both, and not all of them are."""
    alive = expected.flatten(1).any(1)
    assert alive.any()
    assert not found[~alive].any()
    agree(found[alive], expected[alive], name, network_name, rtol)


def compare(name, network_name, model, layers, x, reshape=None, rtol=1e-4):
    """One call on all layers against the peer's, for classes that the network finds likely."""
    target = likely(model, x)
    found = build(name, model, layer=layers)(x, target)
    expected = reference(model, [model.get_submodule(layer) for layer in layers], x, reshape, name, target)
    for one, other in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        if name == "eigen-cam":
            other = other * (one * other).sum((1, 2), keepdim=True).sign()
        rectified_agree(one, other, f"pytorch-grad-cam {name}", network_name, rtol)


@pytest.mark.parametrize(("name", "side", "layer", "grid"), CONVOLUTIONAL)
def test_grad_cam_equals_the_published_libraries(name, side, layer, grid, network, images):
    model, x = network(name), images(3, side)
    with build("grad-cam", model, layer=layer) as method:
        found = method(x, TARGET)
        target_layer = model.get_submodule(method.layer[0])
    assert found.shape == (3, grid, grid)
    rectified_agree(found, reference(model, [target_layer], x)[0], "pytorch-grad-cam grad-cam", name)
    expected = captum.attr.LayerGradCam(model, target_layer).attribute(x, TARGET, relu_attributions=True)
    rectified_agree(found, expected[:, 0], "captum LayerGradCam", name)


def test_grad_cam_on_densenets_last_stage_takes_the_activation_before_the_functional_relu(network, images):
    # pytorch-grad-cam reads this activation after the in-place ReLU has changed it; captum copies it before, as we do.
    model, x = network("densenet121"), images(3, 96)
    found = build("grad-cam", model)(x, TARGET)
    expected = captum.attr.LayerGradCam(model, model.features).attribute(x, TARGET, relu_attributions=True)
    rectified_agree(found, expected[:, 0], "captum LayerGradCam", "densenet121")


def patches(tokens_BTK):
    return tokens_BTK[:, 1:].reshape(len(tokens_BTK), 4, 4, -1).permute(0, 3, 1, 2)


def test_grad_cam_on_vit_leaves_the_class_token_out(network, images):
    model, x = network("small_vit"), images(3, 64)
    with build("grad-cam", model) as method:
        found = method(x, TARGET)
        assert method.layer == ["encoder.layers.encoder_layer_1.ln_1"]

    (expected,) = reference(model, [model.encoder.layers[-1].ln_1], x, patches)
    rectified_agree(found, expected, "pytorch-grad-cam grad-cam", "small_vit")


@pytest.mark.parametrize("layer", ["norm", "features.3.1.norm1", "features.1"])
def test_grad_cam_on_swin_reads_channels_last(layer, network, images):
    model, x = network("small_swin"), images(3, 96)
    found = build("grad-cam", model, layer=layer)(x, TARGET)
    (expected,) = reference(model, [model.get_submodule(layer)], x, lambda out: out.permute(0, 3, 1, 2))
    rectified_agree(found, expected, "pytorch-grad-cam grad-cam", "small_swin")


# Rectified layers, several in one call: where an activation's sum over the cells comes near 0, xgrad-cam divides by it.
SEVERAL = [
    ("resnet18", ["layer1", "layer2", "layer4"]),
    ("resnet50", ["layer2", "layer4.0"]),
    ("vgg16_bn", ["features.22", "features.42"]),
    ("densenet121", ["features.transition1.relu", "features.transition3.relu"]),
    ("mobilenet_v2", ["features.8.conv.0.2", "features.18"]),
    ("googlenet", ["maxpool3", "inception4c", "inception5b"]),
    ("efficientnet_lite0", ["_blocks.10", "_blocks.15"]),
]


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(("network_name", "layers"), SEVERAL)
def test_weighted_cams_equal_pytorch_grad_cam(name, network_name, layers, network, images):
    compare(name, network_name, network(network_name), layers, images(3, 96))


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(
    ("network_name", "side", "layers", "reshape"),
    [
        ("small_vit", 64, ["encoder.layers.encoder_layer_0.ln_1", "encoder.layers.encoder_layer_1.ln_1"], patches),
        ("small_swin", 96, ["features.1", "features.3.0", "features.3.1.mlp.1"], lambda out: out.permute(0, 3, 1, 2)),
    ],
)
def test_weighted_cams_of_tokens_equal_pytorch_grad_cam(name, network_name, side, layers, reshape, network, images):
    if (name, network_name) == ("grad-cam++", "small_swin"):
        layers = layers[-1:]  # of signed activations, 2 + S * G may be nearly 0: rounding in float32 then shows (7e-3)
    compare(name, network_name, network(network_name), layers, images(3, side), reshape)


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 96), ("mobilenet_v2", 96), ("googlenet", 96), ("efficientnet_lite0", 96), ("small_swin", 96)],
)
def test_relu_of_cam_is_hw_times_grad_cam(name, side, network, images):
    model, x = network(name), images(3, side)
    with torch.no_grad():
        target = model(x).argsort(1)[range(3), [0, 500, -1]]  # a map below zero everywhere is among them
    with build("cam", model) as cam, build("grad-cam", model) as grad_cam:
        signed, found = cam(x, target), grad_cam(x, target)
        assert cam.layer == grad_cam.layer
    assert signed.min() < 0
    rectified_agree(signed.relu(), found[0].numel() * found, "hw times grad-cam", name)


def test_mean_of_cam_plus_bias_is_the_logit(network, images):
    # DenseNet's activation is rectified by a functional ReLU: no layer gives it, so Grad-CAM cannot serve as reference.
    for name in ("densenet121", "resnet18"):
        model, x = network(name), images(3, 96)
        with build("cam", model) as method:
            found = method(x, TARGET)
            logit = method.last.logits_BK.gather(1, TARGET[:, None])[:, 0]
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        torch.testing.assert_close(found.mean((1, 2)) + head.bias[TARGET], logit, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vgg16_bn", "small_vit", "small_convnext", "squeezenet1_1", "mobilenet_v3_small"])
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
        ("small_convnext", "features", "features"),
        ("small_maxvit", "blocks.1", "blocks.1"),
        ("efficientnet_lite0", "_swish", "_swish"),
        ("vgg16_bn", "features.42", "avgpool"),  # before the last max pooling
        ("squeezenet1_1", "features", "classifier.2"),  # before the convolutional head
        ("small_swin", "norm", "permute"),  # the same, channels last
    ],
)
def test_default_layer_is_the_last_stage(name, layer, seen, network):
    model = network(name)
    assert default_layer(model) == layer
    assert _last_grid(model, dict(model.named_modules()), 224) == seen


def test_models_that_no_table_knows_are_probed(tiny, images):
    assert default_layer(tiny) == "stage2"
    for wrong, said in (
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), "fails on images of 224"),
        (nn.Flatten(), "no layer"),
    ):
        with pytest.raises(UserError, match=said):
            default_layer(wrong)


def testtoken_grids():
    assert token_grid(196, (224, 224)) == (14, 14)
    assert token_grid(197, (224, 224)) == (14, 14)
    assert token_grid(261, (224, 224)) == (16, 16)  # a class token and four registers
    assert token_grid(14 * 20 + 1, (224, 320)) == (14, 20)
    assert token_grid(20 * 14 + 1, (320, 224)) == (20, 14)
    assert token_grid(1000, (224, 224)) is None


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
    # At 96 pixels its first stage gives 24 x 24 tokens of 24 channels.
    cube = torch.arange(24**3).float().reshape(1, 24, 24, 24)
    found = Taps(network("small_swin"), ["features.1"]).grid(0, cube, (96, 96))
    assert torch.equal(found, cube.permute(0, 3, 1, 2))


@pytest.mark.parametrize("eps", [0, 1e-6, 1e-3])
def test_alphas_follow_their_formula_element_by_element(eps, tiny, images):
    model, x, target = copy.deepcopy(tiny).double(), images(2, 16).double(), torch.tensor([1, 4])
    with build("grad-cam++", model, layer="stage1", eps=eps) as method:
        found = method(x, target)
    for b in range(2):
        A = model.stage1(model.stem(x[b : b + 1]))[0].detach().requires_grad_()
        (G,) = torch.autograd.grad(model.fc(model.stage2(A[None]).mean((2, 3)))[0, target[b]], A)
        expected = torch.zeros(8, 8, dtype=torch.float64)
        for k in range(len(A)):
            alpha = [
                g**2 / (2 * g**2 + float(A[k].detach().sum()) * g**3 + eps) if g else 0 for g in G[k].flatten().tolist()
            ]
            weight = sum(max(g, 0) * a for g, a in zip(G[k].flatten().tolist(), alpha, strict=True))
            expected += weight * A[k].detach()
        agree(found[b : b + 1], expected.relu()[None], "grad-cam++ from its formula, float64", "tiny")


def test_options_of_grad_cam_plus_plus(tiny):
    for wrong in (-1e-9, float("inf"), float("nan")):
        with pytest.raises(UserError, match="0 or more"):
            build("grad-cam++", tiny, eps=wrong)


@pytest.mark.parametrize("name", NEW)
def test_an_activation_of_zeros_gives_a_map_of_zeros(name, tiny, images):
    with torch.no_grad():
        tiny.stage2[1].weight.zero_()
        tiny.stage2[1].bias.fill_(-1)
    with build(name, tiny, layer=["stage1", "stage2"]) as method:
        first, second = method(images(2, 16))
        assert method.last.zero_B.all()
        assert not method.last.nonfinite_B.any()
    assert not second.any()
    assert first.any() == (name == "eigen-cam")  # nothing of stage1 reaches the logits


def test_eigen_cam_takes_no_class_and_turns_along_the_mean_activation(network, images):
    model, x = network("resnet18"), images(3, 96)
    with build("eigen-cam", model, layer="layer3") as method:
        found = method(x, TARGET)
        assert method.last.target_B is None
        assert torch.equal(found, method(x, TARGET + 1))
    assert not method.needs_target
    A = torch.nn.Sequential(*list(model.children())[:7])(x).detach()
    assert ((found * A.mean(1)).sum((1, 2)) > 0).all()
    assert not (found.amax((1, 2)) > -found.amin((1, 2))).all()  # the other rule would turn one
    torch.testing.assert_close(found.sum((1, 2)), torch.zeros(3), rtol=0, atol=1e-4 * float(found.abs().max()))


def test_eigen_cam_of_channels_that_sum_to_zero_is_turned_by_its_peak(network, images):
    model, x = network("small_swin"), images(3, 96)
    with build("eigen-cam", model, layer="norm") as method:
        found = method(x)
        assert (found.amax((1, 2)) > -found.amin((1, 2))).all()
        for i in range(3):
            torch.testing.assert_close(method(x[i : i + 1])[0], found[i], rtol=1e-4, atol=1e-4)


def test_eigen_cam_keeps_a_sample_that_is_not_finite_to_itself(tiny, images):
    x = images(4, 16)
    x[2, 0, 3, 3] = float("nan")
    for layer in ("stem", "stage2"):  # fewer channels than cells
        with build("eigen-cam", tiny, layer=layer) as method:
            found = method(x)
            assert method.last.nonfinite_B.tolist() == [False, False, True, False]
            torch.testing.assert_close(found[3:], method(x[3:]))
        assert not found[2].any()
