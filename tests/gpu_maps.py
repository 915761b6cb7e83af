"""The checks of tests/gpu_check.py on maps: against float64, repeated, in every precision; and where checks run."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saltern.pipeline.bench.figures import compare
from saltern.pipeline.device import arithmetic, memory_format
from saltern.pipeline.extract.explain import AUTOCAST, Explainer
from saltern.pipeline.methods import available, build
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.compiling import compile_parts
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Rule, Target

TOLERANCE = 2e-4  # of a map on the GPU, as a share of its maximum, to the same in float64 on the CPU
MAP_SIDE = 64  # pixels, of the images of float64 maps, which the CPU makes
APART = {"casm", "localizer"}  # methods that need more than a model
FEW: dict[str, dict[str, Any]] = {  # options with which the CPU makes float64 maps in seconds
    "rise": {"masks": 64}, "smoothgrad": {"samples": 4}, "integrated-gradients": {"steps": 4},
    "cameras": {"sizes": [64, 96]},
}  # fmt: skip
COSTLY_S = 2.0  # of a call; methods above it are tried on the first model only
BATCH = {"cpu": 4, "cuda": 256}  # of rates


class Skip(Exception):  # noqa: N818
    """A check that cannot be made here, with the reason."""


@dataclass
class Place:
    """Where the checks run, and how much they do."""

    device: str
    folder: Path
    images: list[bytes]

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def patience_s(self) -> float:
        """Return the limit of a command, which may wait for cores that others use."""
        return 3600 if self.small else 300

    @property
    def side(self) -> int:
        return 64 if self.small else 224

    @property
    def models(self) -> list[str]:
        return ["resnet18"] if self.small else ["resnet50", "vgg16", "efficientnet_b0"]


def maps_exact(place: Place) -> dict[str, Any]:
    """fp32 maps of each method lie within TOLERANCE of float64 maps on the CPU."""
    worst: dict[str, float] = {}
    costly: set[str] = set()  # on the CPU, in float64: only on the first model
    for model in place.models:
        x_BCHW = torch.randn(2, 3, MAP_SIDE, MAP_SIDE, generator=torch.Generator().manual_seed(0))
        for name in methods():
            if name in costly:
                continue
            with arithmetic("fp32", deterministic=False):  # at 64 pixels, VGG's pool has no version that repeats
                found = explain(model, name, x_BCHW, place.device, torch.float32)
                since = time.perf_counter()
                exact = explain(model, name, x_BCHW, "cpu", torch.float64)
                costly |= {name} if time.perf_counter() - since > COSTLY_S else set()
            if found is not None and exact is not None:
                scale = exact.abs().amax().clamp(min=1e-30)
                worst[f"{name} {model}"] = float((found.double().cpu() - exact).abs().amax() / scale)
    far = {case: round(value, 6) for case, value in worst.items() if not value <= TOLERANCE}
    # Max-pools choose among near-equal values, so gradients through them may differ in single cells.
    assert len(far) <= len(worst) // 4, far
    return {"cases": len(worst), "median": float(np.median([*worst.values()])), "far": far}


def methods() -> list[str]:
    """Return the names of the methods that need only a model."""
    return [name for name in available() if name not in APART]


def explain(model: str, name: str, x_BCHW: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Return map_Bhw; None if the method does not apply to the model."""
    network = classifiers.load(model, "none", side=x_BCHW.shape[-1]).model.to(device, dtype)
    try:
        with build(name, network, input_side=x_BCHW.shape[-1], **FEW.get(name, {})) as method:
            found = method(x_BCHW.to(device, dtype))
    except UserError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def maps_repeat(place: Place) -> dict[str, Any]:
    """Two runs of each method give equal bytes."""
    compared, refused = 0, []
    costly: set[str] = set()
    for model in place.models:
        for name in methods():
            if name in costly:
                continue
            since = time.perf_counter()
            try:
                first, second = (columns(place, model, name, "fp32") for _ in range(2))
            except UserError as error:
                refused.append(f"{name} {model}: {error}"[:90])
                continue
            costly |= {name} if time.perf_counter() - since > 2 * COSTLY_S else set()
            for key, value in first.items():
                assert value.tobytes() == second[key].tobytes(), (name, model, key)
            compared += 1
    assert compared
    return {"compared": compared, "refused": refused}


def columns(place: Place, model: str, name: str, precision: str) -> dict[str, np.ndarray]:
    """Return the columns of one batch, from a new explainer."""
    device = torch.device(place.device)
    how = Preprocess(place.side, place.side)
    pixels_BHWC = torch.randint(256, (4, place.side, place.side, 3), generator=torch.Generator().manual_seed(1)).byte()
    with arithmetic(precision):
        network = classifiers.load(model, "none", side=place.side).model.to(device)
        network = network if precision == "fp32" else network.to(memory_format=torch.channels_last)
        method = build(name, network, input_side=place.side)
        explainer = Explainer(
            method, device, how, target=Target.parse("top1", 1000), rule=Rule.parse("mean:1"), precision=precision
        )
        found = explainer(pixels_BHWC, torch.zeros(4, dtype=torch.long)).wait()[0].columns
        method.close()
    return found


def precisions(place: Place) -> dict[str, Any]:
    """tf32, bf16 and fp16 give the maps of fp32, but for rounding."""
    found = {}
    for precision in ("tf32", "bf16", "fp16"):
        if precision == "fp16" and place.small:
            continue
        maps = [columns(place, place.models[0], "grad-cam", each)["map"].ravel() for each in ("fp32", precision)]
        found[precision] = float(np.corrcoef(*maps)[0, 1])
        assert found[precision] > 0.98, found
    return found


def compiled(place: Place) -> dict[str, Any]:
    """Compiled Grad-CAM gives nearly the maps of the eager one; images/s of both, and of the eager forward pass."""
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        raise Skip("there is no C compiler, which torch.compile needs")
    device, found = torch.device(place.device), {}
    for precision, bound in (("fp32", 1e-3), ("bf16", 0.05)):
        dtype = AUTOCAST.get(precision)
        network = classifiers.load(place.models[0], "none", side=place.side).model.to(device)
        network = network.to(memory_format=memory_format(precision, device))
        method = build("grad-cam", network, input_side=place.side)
        x_BCHW = torch.randn(BATCH[place.device], 3, place.side, place.side, device=device)
        x_BCHW = x_BCHW.contiguous(memory_format=memory_format(precision, device))
        with arithmetic(precision), torch.autocast(place.device, dtype, dtype is not None), torch.no_grad():
            if dtype is not None:
                method.halve(x_BCHW[:1], dtype)
            calls = {"forward": lambda: network(x_BCHW), "eager": lambda: method(x_BCHW)}  # noqa: B023
            times = compare(calls, len(x_BCHW), place.device, 3)
            eager = method(x_BCHW)
            compile_parts(method.trunk(), deterministic=True)
            off = float((method(x_BCHW) - eager).abs().amax() / eager.abs().amax())
            times |= compare({"compiled": calls["eager"]}, len(x_BCHW), place.device, 3)
        assert off <= bound, (precision, off)
        found |= {f"{precision} off": off, **{f"{precision} {name}": 1000 / each.ms for name, each in times.items()}}
    found["compiled / forward"] = found["bf16 compiled"] / found["bf16 forward"]
    return found
