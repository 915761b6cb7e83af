"""Methods of one layer that share their passes give the bits of single calls, and share only passes of equal bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from saltern.pipeline.methods import available, build
from saltern.pipeline.methods.cams.one_pass import OnePass, SharedPass

NAMES = [name for name, kind in available().items() if issubclass(kind, OnePass)]


def passes_of(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the forward passes of a model in a call."""
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    run()
    handle.remove()
    return len(calls)


def check_bits(model: nn.Module, names: list[str], x_BCHW: Tensor, target_B: Tensor | None, number: int) -> int:
    """Compare a shared call with single calls. Return the forward passes of a second shared call."""
    methods = [build(name, model) for name in names]
    shared = SharedPass(methods)  # type: ignore[arg-type]
    found = shared.explain(x_BCHW, target_B, None, number)
    for method, results in zip(methods, found, strict=True):
        alone = method.explain(x_BCHW, target_B, None, number if method.needs_target else 1)
        assert len(results) == len(alone), method.name
        for (maps, last), (expected, other) in zip(results, alone, strict=True):
            assert torch.equal(maps, expected), method.name
            assert torch.equal(last.logits_BK, other.logits_BK), method.name
            assert (last.target_B is None) == (not method.needs_target)
            if last.target_B is not None:
                assert torch.equal(last.target_B, other.target_B), method.name
    return passes_of(model, lambda: shared.explain(x_BCHW, target_B, None, number))


def test_the_methods_are_those_of_one_forward_pass() -> None:
    assert sorted(NAMES) == sorted(
        ["cam", "grad-cam", "grad-cam++", "xgrad-cam", "layer-cam", "hires-cam", "eigen-cam"]
    )


@pytest.mark.parametrize("number", [1, 3])
def test_shared_passes_give_the_bits_of_single_calls(tiny, images, number) -> None:
    assert check_bits(tiny, NAMES, images(5, 32), None, number) == 1
    if number == 1:
        assert check_bits(tiny, NAMES, images(3, 32), torch.tensor([4, 0, 2]), 1) == 1
        assert check_bits(tiny, ["eigen-cam", "cam"], images(3, 32), torch.tensor([1, 0, 2]), 1) == 1


class Fickle(nn.Module):
    """Network whose logits have other bits if a gradient is recorded, as those of attention may have."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.body(x_BCHW)
        return logits_BK * (1 + 1e-6) if logits_BK.requires_grad else logits_BK


def test_passes_of_other_bits_are_not_shared(tiny, images) -> None:
    names = ["grad-cam", "eigen-cam", "layer-cam"]
    assert check_bits(Fickle(tiny), names, images(4, 32), None, 1) == 2  # one with a gradient, one without
    assert check_bits(Fickle(tiny), ["grad-cam", "layer-cam"], images(4, 32), None, 1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_vit", "small_swin"])
def test_transformers(network, name, images) -> None:
    model = network(name)
    side = 64 if name == "small_vit" else 224
    names = [each for each in NAMES if each != "cam"]
    assert check_bits(model, names, images(3, side), None, 2) in (1, 2)
