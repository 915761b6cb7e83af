"""Compare CASM's training step to the forward and backward passes that it cannot avoid, in fp32 and bf16.

Shape suffixes: B batch, C H W the network's input, K classes, h w the decoder's grid.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saltern.pipeline.bench.figures import against_goal, compare, peak_bytes
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS, Thinning, thinning_named
from saltern.pipeline.device import arithmetic
from saltern.pipeline.masknet.network import Decoder, Trunk
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.models import classifiers
from saltern.pipeline.tables import markdown_table
from saltern.schemas.sizes import square_of

GOAL = 1.15  # of step / limit
PRECISIONS = ("fp32", "bf16")
_POOL = 4  # past classifiers to draw from; a step costs as much as with the usual 30


@dataclass(frozen=True)
class CasmBench:
    """Options of the measurement."""

    model: str = "resnet50"
    device: str = "cpu"
    batch_size: int = 32
    rounds: int = 5
    thinnings: Sequence[str] = ("F", "L", "L100")


class Kind(NamedTuple):
    """A kind of training step. All steps of one kind cost the same."""

    trained: bool  # the classifier f learns
    past: bool  # a past f judges the masked images, not the current one

    def __str__(self) -> str:
        if not self.trained:
            return "f fixed"
        return "f trained, a past f judges" if self.past else "f trained, and judges"

    def limit(self) -> str:
        """Return the passes that a step of this kind cannot avoid, as text."""
        if not self.trained:
            return "clean forward; masked forward, backward to the image"
        clean = "clean forward, backward to f's weights"
        if self.past:
            return f"{clean}; masked forward through the past f (weights without gradients), backward to the image"
        return f"{clean}; masked forward, backward to the image, another backward to f's weights"


def mix(thinning: Thinning) -> dict[Kind, float]:
    """Return the expected share of each kind of step, once the pool has a member."""
    shares = {Kind(thinning.trained, False): 1 - thinning.hp, Kind(thinning.trained, True): thinning.hp}
    return {kind: share for kind, share in shares.items() if share}


def measure(bench: CasmBench, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield one entry for each kind of step in each precision, then one for each thinning that mixes kinds.

    Raises:
        UserError: an unknown thinning; a model that cannot be loaded, or has no stages.
    """
    mixes = {name: mix(thinning_named(name)) for name in bench.thinnings}
    entries: dict[tuple[Kind, str], dict[str, Any]] = {}
    for kind in dict.fromkeys(kind for shares in mixes.values() for kind in shares):
        for precision in PRECISIONS:
            say(f"{kind}, {precision}")
            names = [name for name, shares in mixes.items() if kind in shares]
            entries[kind, precision] = {"thinnings": names, **_measure(kind, precision, bench)}
            yield entries[kind, precision]
            gc.collect()
    for name, shares in mixes.items():
        for precision in PRECISIONS if len(shares) > 1 else ():
            parts = [(share, entries[kind, precision]) for kind, share in shares.items()]
            yield _expected(name, precision, parts)


def _measure(kind: Kind, precision: str, bench: CasmBench) -> dict[str, Any]:
    classifier = classifiers.load(bench.model, "none")
    model = classifier.model.to(bench.device).to(memory_format=torch.channels_last)
    batch, side = bench.batch_size, square_of(classifier.preprocess.crop)
    draw = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(batch, 3, side, side, generator=draw)
    x_BCHW = x_BCHW.to(bench.device, memory_format=torch.channels_last)
    label_B = torch.randint(classifier.classes, (batch,), generator=draw).to(bench.device)
    with arithmetic(precision):  # as train-casm does
        sides = Sides(model, kind, precision, x_BCHW, label_B)
        calls = {"step": sides.step, "limit": sides.limit, "optimisers": sides.optimisers}
        times = compare(calls, batch, bench.device, bench.rounds)
        peak = {name: peak_bytes(calls[name], bench.device) / 1e6 / batch for name in ("step", "limit")}
    return {
        "kind": str(kind),
        "limit": kind.limit(),
        "precision": precision,
        **_ratio({name: side.ms for name, side in times.items()}),
        "core_over_limit": times["step"].core_ms / times["limit"].core_ms if bench.device == "cpu" else None,
        "peak_mb": peak,
        "rounds": {name: side.rounds for name, side in times.items()},
    }


def _expected(name: str, precision: str, parts: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Return the expected entry of a thinning that draws the kind of each step: weighted medians, the larger peak."""
    ms = {side: sum(share * entry["ms"][side] for share, entry in parts) for side in ("step", "limit", "optimisers")}
    return {
        "thinnings": [name],
        "kind": "expected: " + ", ".join(f"{share:g} x {entry['kind']}" for share, entry in parts),
        "limit": "the kinds' limits by the same shares",
        "precision": precision,
        **_ratio(ms),
        "peak_mb": {side: max(entry["peak_mb"][side] for _, entry in parts) for side in ("step", "limit")},
    }


def _ratio(ms: dict[str, float]) -> dict[str, Any]:
    return {"ms": ms, "over_limit": ms["step"] / ms["limit"], "goal": GOAL}


class Sides:
    """A training step, its limit, and its optimisers' steps, each on its own copy of the model.

    Args:
        model: on its device.
        x_BCHW: normalised images.
        label_B: their classes.
    """

    def __init__(self, model: nn.Module, kind: Kind, precision: str, x_BCHW: Tensor, label_B: Tensor) -> None:
        self._kind, self._precision, self._x_BCHW, self._label_B = kind, precision, x_BCHW, label_B
        self._training = _training(copy.deepcopy(model), kind, precision)
        self._f = copy.deepcopy(model).train(kind.trained).requires_grad_(kind.trained)
        self._judge = copy.deepcopy(model).eval().requires_grad_(False) if kind.past else self._f
        stages = find_stages(self._f)
        self._trunk = Trunk(self._f, stages.names)
        self._decoder = Decoder(stages.channels).to(x_BCHW.device)
        self._f_weights, self._mask_weights = list(self._f.parameters()), list(self._decoder.parameters())
        self._sgd = torch.optim.SGD(self._f_weights, 0.0, momentum=0.9, weight_decay=1e-4)
        self._adam = torch.optim.Adam(self._mask_weights, 0.0, weight_decay=1e-4)
        for weight in (*self._f_weights, *self._mask_weights):
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None

    def step(self) -> None:
        """Take one training step."""
        self._training.step(self._x_BCHW, self._label_B)

    def limit(self) -> None:
        """Run the kind's passes and the decoder's forward and backward, without losses and optimisers."""
        with torch.set_grad_enabled(self._kind.trained), self._autocast():
            logits_BK, taps = self._trunk(self._x_BCHW)
        if self._kind.trained:
            _backward(logits_BK, self._f_weights)
        with self._autocast():
            mask_B1hw = self._decoder(taps)
        _backward(mask_B1hw, self._mask_weights)
        masked_BCHW = self._x_BCHW.detach().requires_grad_()
        with self._autocast():
            logits_BK = self._judge(masked_BCHW)
        learns = self._kind.trained and not self._kind.past
        _backward(logits_BK, [masked_BCHW], again=learns)
        if learns:
            _backward(logits_BK, self._f_weights)

    def optimisers(self) -> None:
        """Take the steps of SGD and Adam that are part of the training step."""
        for _ in range(0 if not self._kind.trained else 1 if self._kind.past else 2):
            self._sgd.step()
        self._adam.step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._x_BCHW.device.type, torch.bfloat16, enabled=self._precision == "bf16")


def _training(model: nn.Module, kind: Kind, precision: str) -> Training:
    """Return a training whose steps are all of one kind. Its learning rates are 0, so that no value diverges."""
    # hp is the probability of a past classifier: at 0 and at 1, every step is of the same kind.
    thinning = replace(THINNINGS["L100"], trained=kind.trained, hp=float(kind.past))
    hyperparameters = Hyperparameters(thinning, precision=precision, pool_size=_POOL, lr_classifier=0.0, lr_mask=0.0)
    training = Training(model, hyperparameters)
    if kind.past:
        for slot in range(_POOL):
            training.pool.add(model, slot, slot)
        training.steps_done = _POOL * (thinning.save_every or 1)
    return training


def _backward(output: Tensor, inputs: Sequence[Tensor], again: bool = False) -> None:
    torch.autograd.grad(output, inputs, torch.ones_like(output), retain_graph=again)


def as_table(entries: Sequence[dict[str, Any]]) -> str:
    """Return the entries as a Markdown table, followed by the passes of each limit."""
    heads = ["step", "thinning", "", "ms an image", "limit", "/ limit", "core time / limit", "optimisers"]
    table = markdown_table([*heads, "peak MB (limit)"], map(_cells, entries))
    limits = dict.fromkeys(f'- limit of "{entry["kind"]}": {entry["limit"]}.' for entry in entries)
    return "\n".join([table, "", *limits, ""])


def _cells(entry: dict[str, Any]) -> list[str]:
    ms, peak, core = entry["ms"], entry["peak_mb"], entry.get("core_over_limit")
    return [
        entry["kind"],
        ", ".join(entry["thinnings"]),
        entry["precision"],
        f"{ms['step']:.4g}",
        f"{ms['limit']:.4g}",
        _verdict(entry),
        f"{core:.3f}" if core else "-",
        f"{ms['optimisers']:.2g}",
        f"{peak['step']:.0f} ({peak['limit']:.0f})",
    ]


def _verdict(entry: dict[str, Any]) -> str:
    text, ms = against_goal(entry["over_limit"], entry["goal"], digits=3), entry["ms"]
    if entry["over_limit"] <= entry["goal"]:
        return text
    rest = ms["step"] - ms["limit"] - ms["optimisers"]
    return f"{text}: {ms['optimisers']:.2g} ms go to the optimisers, {rest:.2g} to the rest"
