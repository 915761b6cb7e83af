"""Methods and the steps around them stay on the model's device: here torch's meta device stands for a GPU.

A tensor of the CPU that meets one of the device is an error there, as is any read of a value. Under deterministic
algorithms, `interpolate` takes the way that it takes on a GPU.
"""

import contextlib

import pytest
import torch
from networks import randomise
from test_contract import NAMES, build
from test_repeatable import Pooled
from torch import nn

from saltern.pipeline.device import arithmetic
from saltern.pipeline.extract.explain import Explainer
from saltern.pipeline.models.pools import use_even_pools
from saltern.schemas.config import Preprocess
from saltern.schemas.rules import Rule, Target

META = torch.device("meta")
READS = {"ablation-cam"}  # the logits of two passes, which it compares


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let code under autocast run on the meta device, which autocast does not know."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *given: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *given: torch.float32)


@pytest.fixture
def pooled() -> nn.Module:
    torch.manual_seed(0)
    model = randomise(Pooled())
    use_even_pools(model)
    return model


def explainer(name: str, model: nn.Module, rule: str = "mean:1", **how: str) -> Explainer:
    """Return the explainer of a method that is built on the CPU and then moved."""
    layer = {"layer": "first"} if name.endswith(("cam", "cam++", "cameras")) else {}
    method = build(name, model, **layer)
    model.to(META)
    for attribute, value in vars(method).items():
        if isinstance(value, torch.Tensor):
            setattr(method, attribute, value.to(META))
    target = Target.parse("top:2" if method.needs_target else "label", 5)
    return Explainer(method, META, Preprocess(24, 24), target=target, rule=Rule.parse(rule), **how)


def columns(explain: Explainer) -> dict[str, torch.Tensor]:
    with arithmetic("fp32"):
        seed_B = torch.tensor([1, 2])
        return explain(torch.zeros(2, 24, 24, 3, dtype=torch.uint8), torch.tensor([0, 1]), seed_B)._columns


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in READS | {"cam"}])
def test_every_method_stays_on_the_device(name: str, pooled: nn.Module) -> None:
    explain = explainer(name, pooled)
    found = columns(explain)
    assert {column.device for column in found.values()} == {META}
    assert len(found["map"]) == 2 * explain.rows_each


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["otsu", "quantile:0.9", "fraction", "mean-std:1", "fixed:0.5", "max:0.5"])
@pytest.mark.parametrize(("map_size", "map_dtype"), [("input", "uint8"), ("native", "float16")])
def test_masks_and_maps_are_encoded_on_the_device(rule: str, map_size: str, map_dtype: str, pooled: nn.Module) -> None:
    found = columns(explainer("grad-cam", pooled, rule, map_size=map_size, map_dtype=map_dtype))
    assert {column.device for column in found.values()} == {META}
    assert found["mask"].shape == (4, 24 * 24 // 8)
