"""CASM's training step beside the forwards and backwards that it cannot avoid, in fp32 and bf16.

Needs no ray and reads no shard. Shape suffixes: B batch, C H W the network's input.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saltern.pipeline.bench.figures import Side, by_turns, peak_bytes, ratio
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS, Thinning, thinning_named
from saltern.pipeline.machine import exact
from saltern.pipeline.masknet.network import Decoder, Trunk
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.models import classifiers

GOAL = 1.15  # of step / limit
PRECISIONS = ("fp32", "bf16")
SIDES = ("step", "limit", "optimisers")
_ENOUGH_S = 1.0  # of one round of one side; faster calls are repeated
_POOL = 4  # past classifiers, of which each step draws one: as costly as the pool's full 30


@dataclass(frozen=True)
class Bench:
    """What to measure on."""

    model: str = "resnet50"
    device: str = "cpu"
    batch_size: int = 32
    rounds: int = 5
    thinnings: Sequence[str] = ("F", "L", "L100")


class Kind(NamedTuple):
    """What a step costs depends on these alone."""

    trained: bool  # f learns
    past: bool  # a past f judges the masked images, not the current one

    def __str__(self) -> str:
        if not self.trained:
            return "f fixed"
        return "f trained, a past f judges" if self.past else "f trained, and judges"

    def limit(self) -> str:
        """The passes that a step of this kind cannot avoid, in words."""
        if not self.trained:
            return "clean forward; masked forward, backward to the image"
        clean = "clean forward, backward to f's weights"
        if self.past:
            return f"{clean}; masked forward through the past f (weights without gradients), backward to the image"
        return f"{clean}; masked forward, backward to the image, another backward to f's weights"


def mix(thinning: Thinning) -> dict[Kind, float]:
    """The expected share of each kind of step, once the pool has a member."""
    shares = {Kind(thinning.trained, False): 1 - thinning.hp, Kind(thinning.trained, True): thinning.hp}
    return {kind: share for kind, share in shares.items() if share}


class Sides:
    """The step, its limit and its optimisers by themselves, on the same images.

    Args:
        model: where it shall run; each side works on its own copy.
        x_BCHW: normalised images; label_B: their classes.
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
        self._training.step(self._x_BCHW, self._label_B)

    def limit(self) -> None:
        """The kind's passes, the decoder's forward and backward among them; neither losses nor optimisers."""
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
        """Those steps of SGD and Adam that the training step takes."""
        for _ in range(0 if not self._kind.trained else 1 if self._kind.past else 2):
            self._sgd.step()
        self._adam.step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._x_BCHW.device.type, torch.bfloat16, enabled=self._precision == "bf16")


def _training(model: nn.Module, kind: Kind, precision: str) -> Training:
    """One whose steps are all of one kind. It learns at a rate of 0: as costly, and no value runs away."""
    # hp decides which kind a step is, so at 0 and at 1 every step is of the same.
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


def measure(bench: Bench, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One entry for each kind of step in each precision, then one for each thinning that mixes kinds.

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
            yield _mixed(name, precision, {kind: (share, entries[kind, precision]) for kind, share in shares.items()})


def _measure(kind: Kind, precision: str, bench: Bench) -> dict[str, Any]:
    classifier = classifiers.load(bench.model, "none")
    model = classifier.model.to(bench.device).to(memory_format=torch.channels_last)
    batch, side = bench.batch_size, classifier.preprocess.crop
    draw = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(batch, 3, side, side, generator=draw)
    x_BCHW = x_BCHW.to(bench.device, memory_format=torch.channels_last)
    label_B = torch.randint(classifier.classes, (batch,), generator=draw).to(bench.device)
    with exact():
        sides = Sides(model, kind, precision, x_BCHW, label_B)
        timed = {name: _timed(getattr(sides, name), batch, bench.device) for name in SIDES}
        rates = by_turns(bench.rounds, *timed.values())
        peak = {name: peak_bytes(getattr(sides, name), bench.device) / 1e6 / batch for name in ("step", "limit")}
    rounds = {name: [1000 / rate for rate in found] for name, found in zip(SIDES, rates, strict=True)}
    core_rounds = {name: side.core_ms for name, side in timed.items()} if bench.device == "cpu" else None
    return {
        "kind": str(kind),
        "limit": kind.limit(),
        "precision": precision,
        **_held_to({name: median(found) for name, found in rounds.items()}),
        "core_over_limit": core_rounds and ratio(core_rounds["step"], core_rounds["limit"]),
        "peak_mb": peak,
        "rounds": rounds,
        "core_rounds": core_rounds,
    }


def _mixed(name: str, precision: str, parts: dict[Kind, tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """What is expected of a step whose kind is drawn: medians by their shares, the larger peak."""
    ms = {side: sum(share * entry["ms"][side] for share, entry in parts.values()) for side in SIDES}
    return {
        "thinnings": [name],
        "kind": "expected: " + ", ".join(f"{share:g} x {kind}" for kind, (share, _) in parts.items()),
        "limit": "the kinds' limits by the same shares",
        "precision": precision,
        **_held_to(ms),
        "peak_mb": {side: max(entry["peak_mb"][side] for _, entry in parts.values()) for side in ("step", "limit")},
    }


def _held_to(ms: dict[str, float]) -> dict[str, Any]:
    return {"ms": ms, "over_limit": ms["step"] / ms["limit"], "goal": GOAL}


def _timed(work: Callable[[], None], batch: int, device: str) -> Side:
    """Calls that follow each other without a wait between them, as steps do."""

    def run(repeats: int) -> int:
        for _ in range(repeats):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return repeats * batch

    run(1)  # warm
    repeats = max(1, round(_ENOUGH_S * Side(lambda: run(1))() / batch))
    return Side(lambda: run(repeats))


NOTES = """
- To each limit comes the decoder's forward and its backward to its weights. No limit holds hooks, losses, the masking,
  clipping, the copy of a past f or optimisers; layout (channels_last), BatchNorm mode and autocast are the step's.
- The two backwards of "f trained, and judges" differentiate two losses, of the mask and of f, and cannot be one.
- Optimisers: the steps of SGD and Adam alone; in the step's time, not in the limit's.
- Random weights and images, nothing read or decoded; all sides with torch's deterministic algorithms, as train-casm has
  them. Each step draws its past f among {pool}. A thinning's expected row is by hp.
"""


def as_table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as a Markdown table, with what the limits contain."""
    lines = [
        "| step | thinning | | ms an image | limit | / limit | core time / limit | optimisers | peak MB (limit) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        ms, peak, core = entry["ms"], entry["peak_mb"], entry.get("core_over_limit")
        lines.append(
            f"| {entry['kind']} | {', '.join(entry['thinnings'])} | {entry['precision']} | {ms['step']:.4g} "
            f"| {ms['limit']:.4g} | {_verdict(entry)} | {f'{core:.3f}' if core else '-'} | {ms['optimisers']:.2g} "
            f"| {peak['step']:.0f} ({peak['limit']:.0f}) |"
        )
    limits = dict.fromkeys(f'- limit of "{entry["kind"]}": {entry["limit"]}.' for entry in entries)
    return "\n".join([*lines, "", *limits]) + NOTES.format(pool=_POOL)


def _verdict(entry: dict[str, Any]) -> str:
    value, goal, ms = entry["over_limit"], entry["goal"], entry["ms"]
    if value <= goal:
        return f"{value:.3f} (<= {goal})"
    rest = ms["step"] - ms["limit"] - ms["optimisers"]
    return f"**{value:.3f}** (<= {goal}): {ms['optimisers']:.2g} ms go to the optimisers, {rest:.2g} to the rest"
