"""ShapleyCAM against whole Hessians in float64, and against pytorch-grad-cam."""

import copy

import pytest
import pytorch_grad_cam as theirs
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputReST, ClassifierOutputTarget
from references import agree
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saltern.pipeline.methods import build
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow


def naive(model, layer, image_CHW, c, utility, grid):
    """One image in float64: the Hessian of the utility in the layer's output, entry by entry."""
    model, x = copy.deepcopy(model).double(), image_CHW.double()[None]
    module, kept = model.get_submodule(layer), []
    handle = module.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    A = kept[0]

    def of(flat):
        handle = module.register_forward_hook(lambda module, args, output: flat.view_as(output))
        try:
            logits = model(x)[0]
        finally:
            handle.remove()
        return logits[c] + (logits.log_softmax(0)[c] if utility == "rest" else 0)

    flat = A.flatten()
    with sdpa_kernel(SDPBackend.MATH):
        G = torch.autograd.functional.jacobian(of, flat)
        H = torch.autograd.functional.hessian(of, flat)
    A_Khw, weight_Khw = grid(A)[0], grid((G - H @ flat / 2).view_as(A))[0]
    return sum(weight.mean() * channel for weight, channel in zip(weight_Khw, A_Khw, strict=True)).relu(), H


@pytest.mark.parametrize("utility", ["rest", "logit"])
@pytest.mark.parametrize(("layer", "curved"), [("stage1", False), ("stage2", False)])
def test_against_whole_hessians(layer, curved, utility, tiny, images):
    x = images(2, 8)
    target = tiny(x).argmax(1)
    with build("shapley-cam", tiny, layer=layer, utility=utility) as method:
        found = method(x, target)
    expected, hessians = zip(
        *(naive(tiny, layer, one, int(c), utility, lambda A: A) for one, c in zip(x, target, strict=True)), strict=True
    )
    # A network of ReLUs is piecewise linear: only the log-probability bends the utility.
    assert (max(float(H.abs().max()) for H in hessians) > 1e-6) == (utility == "rest")
    agree(found, torch.stack(expected), "Hessian in float64", f"tiny {layer} {utility}")
    if utility == "logit":
        torch.testing.assert_close(found, build("grad-cam", tiny, layer=layer)(x, target))


def test_against_whole_hessians_through_attention(network, images):
    model, x = network("tiny_vit"), images(1, 64)

    def grid(tokens_BTK):
        return tokens_BTK[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    target = model(x).argmax(1)
    with build("shapley-cam", model, utility="logit") as method:
        found = method(x, target)
        expected, H = naive(model, method.layer[0], x[0], int(target), "logit", grid)
    assert float(H.abs().max()) > 1e-6
    agree(found, expected[None], "Hessian in float64", "tiny_vit logit")


@pytest.mark.parametrize("utility", ["rest", "logit"])
def test_against_pytorch_grad_cam(utility, network, images):
    model, x = network("resnet18"), images(3, 64)
    classes = model(x).argmax(1)
    kind = ClassifierOutputReST if utility == "rest" else ClassifierOutputTarget
    targets = [kind(int(c)) for c in classes]
    raw = []
    with theirs.ShapleyCAM(model, [model.layer3]) as cam:
        held = cam.activations_and_grads
        cam.compute_cam_per_layer = lambda x, targets, smooth: raw.append(
            cam.get_cam_image(x, model.layer3, targets, held.activations[0], held.gradients[0])
        )
        cam.aggregate_multi_layers = lambda maps: None
        cam(x, targets)
    with build("shapley-cam", model, layer="layer3", utility=utility) as method:
        agree(method(x, classes), torch.from_numpy(raw[0]).relu(), "pytorch-grad-cam ShapleyCAM", f"resnet18 {utility}")


def test_an_operation_without_a_second_derivative_is_named(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            q = self.conv(x).flatten(2).mT[:, None]  # one head
            out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
            return self.fc(out.mean((1, 2)))

    with (
        build("shapley-cam", Net().eval(), layer="conv") as method,
        pytest.raises(UserError, match=r"shapley-cam differentiates twice, and Net .*use grad-cam"),
    ):
        method(images(1, 8))
