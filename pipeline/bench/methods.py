"""Every method beside the forwards and backwards that it cannot avoid, beside its peers, and in bf16 + channels_last.

Needs no ray and reads no shard. Shape suffixes: B batch, C H W the network's input, K classes.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.bench.figures import by_turns, peak_bytes
from saltern.pipeline.bench.peers import PEERS, Call
from saltern.pipeline.methods import Method, build
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.passes import frozen
from saltern.pipeline.models.taps import Taps

_IMPORTED_AS = {"captum": "captum", "pytorch-grad-cam": "pytorch_grad_cam", "torchcam": "torchcam", "zennit": "zennit"}
_ENOUGH_S = 1.0  # of one round of one side; faster calls are repeated


@dataclass(frozen=True)
class Work:
    """Pieces of which limits are made, on one model."""

    model: nn.Module
    x_BCHW: Tensor
    target_B: Tensor
    method: Method

    def forward(self, x_BCHW: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            logits_BK: Tensor = self.model(self.x_BCHW if x_BCHW is None else x_BCHW)
        return logits_BK

    def to_input(self, backwards: int = 1, x_BCHW: Tensor | None = None) -> None:
        """A forward pass, then so many backward passes to the pixels; parameters need no gradients."""
        x_BCHW = (self.x_BCHW if x_BCHW is None else x_BCHW).detach().requires_grad_()
        self._differentiate(self.model(x_BCHW), [x_BCHW], backwards)

    def to_layer(self, backwards: int = 1, x_BCHW: Tensor | None = None) -> None:
        """A forward pass without a record below the layer, then so many backward passes to it."""
        taps = Taps(self.model, self.method.layer)
        x_BCHW = self.x_BCHW if x_BCHW is None else x_BCHW
        self._differentiate(*taps.forward(x_BCHW, differentiable=True), backwards)

    def _differentiate(self, logits_BK: Tensor, inputs: Sequence[Tensor], backwards: int) -> None:
        score = logits_BK.gather(1, self.target_B[: len(logits_BK), None]).sum()
        for left in reversed(range(backwards)):
            torch.autograd.grad(score, inputs, retain_graph=left > 0)

    def resized(self, size: int) -> Tensor:
        return F.interpolate(self.x_BCHW, (size, size), mode="bicubic")

    def passes(self, images: int) -> list[Tensor]:
        """Slices of a tensor of random images, `chunk` at a time, `images` in all."""
        chunk = max(1, self.method.options["chunk"] // len(self.x_BCHW)) * len(self.x_BCHW)
        x_BCHW = self.x_BCHW.repeat(-(-min(chunk, images) // len(self.x_BCHW)), 1, 1, 1)
        whole, rest = divmod(images, chunk)
        return [x_BCHW] * whole + ([x_BCHW[:rest]] if rest else [])


@dataclass(frozen=True)
class Case:
    """One row: a method, what it cannot avoid, and the goal for their ratio."""

    method: str
    limit: Callable[[Work], Any]
    said: str  # the limit, in words
    goal: float | None = None  # of method / limit; None where none is set
    model: str | None = None  # where it is another than the bench's
    layer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batch: int | None = None  # where a full batch would take too long
    peer_goal: float = 1.0  # of peer / method


def _limit(case: Case, work: Work) -> None:
    with frozen(work.model):
        case.limit(work)


def _forward(work: Work) -> None:
    work.forward()


def _expanded(name: str, backward: bool = True) -> Callable[[Work], None]:
    """One forward for the logits, and one forward and backward for each of `name` (steps, samples)."""

    def limit(work: Work) -> None:
        work.forward()
        for x_BCHW in work.passes(work.method.options[name] * len(work.x_BCHW)):
            target_B = work.target_B.repeat(len(x_BCHW) // len(work.target_B))
            Work(work.model, x_BCHW, target_B, work.method).to_input()

    return limit


def _occluded(work: Work) -> None:
    window, stride = work.method.options["window"], work.method.options["stride"]
    a_side = -(-max(0, work.x_BCHW.shape[3] - window) // stride) + 1
    work.forward()
    for x_BCHW in work.passes(a_side**2 * len(work.x_BCHW)):
        work.forward(x_BCHW)


def _scored(work: Work) -> None:
    channels = Taps(work.model, work.method.layer).forward(work.x_BCHW)[1][0].shape[1]
    work.forward()
    for x_BCHW in work.passes(channels * len(work.x_BCHW)):
        work.forward(x_BCHW)


def _every_size(work: Work) -> None:
    work.to_layer()
    for size in range(work.x_BCHW.shape[2] + 100, 1000, 100):
        work.to_layer(x_BCHW=work.resized(size))


CASES = [
    Case("cam", _forward, "a forward", 1.05),
    Case("grad-cam", _forward, "a forward", 1.05, peer_goal=5.0),
    Case("grad-cam++", _forward, "a forward", 1.05),
    Case("layer-cam", _forward, "a forward", 1.05),
    Case("hires-cam", _forward, "a forward", 1.05),
    Case("xgrad-cam", _forward, "a forward", 1.05),
    Case("eigen-cam", _forward, "a forward", 1.05),
    Case("grad-cam", Work.to_layer, "a forward, a backward to layer2", 1.05, layer="layer2"),
    Case("gradient", Work.to_input, "a forward, a backward", 1.10),
    Case("deconvnet", Work.to_input, "a forward, a backward", 1.10),
    Case("guided-backprop", Work.to_input, "a forward, a backward", 1.10),
    Case("guided-grad-cam", Work.to_input, "a forward, a backward", 1.10),
    Case("input-x-gradient", Work.to_input, "a forward, a backward", 1.10),
    Case("integrated-gradients", _expanded("steps"), "9 forwards, 8 backwards", 1.10, options={"steps": 8}, batch=8),
    Case("smoothgrad", _expanded("samples"), "9 forwards, 8 backwards", 1.10, options={"samples": 8}, batch=8),
    Case("occlusion", _occluded, "37 forwards", 1.05, options={"window": 64, "stride": 32}, batch=4),
    Case("score-cam", _scored, "65 forwards", 1.10, model="resnet18", layer="layer1", batch=2),
    Case("ablation-cam", _forward, "a forward", None, model="resnet18", layer="layer2", batch=2),
    Case("relevance-cam", lambda work: work.to_layer(2), "a forward, 2 backwards to layer2", 1.5, layer="layer2"),
    Case("lrp", lambda work: work.to_input(2), "a forward, 2 backwards", None),
    Case("cameras", _every_size, "8 forwards and backwards to layer4", 1.2, batch=2),
]


@dataclass(frozen=True)
class Bench:
    """What to measure on."""

    model: str = "resnet50"
    device: str = "cpu"
    batch_size: int = 16
    rounds: int = 5
    only: Sequence[str] = ()  # methods; empty = all


def measure(bench: Bench, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One entry a case: medians in ms an image, ratios, peak memory in MB an image, and every round."""
    for case in CASES:
        if not bench.only or case.method in bench.only:
            say(f"{case.method} {case.layer or ''}")
            yield _measure(case, bench)
            gc.collect()


def _measure(case: Case, bench: Bench) -> dict[str, Any]:
    device = torch.device(bench.device)
    model = classifiers.load(case.model or bench.model, "none").model.to(device)
    batch = min(case.batch or bench.batch_size, bench.batch_size)
    draw = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(batch, 3, 224, 224, generator=draw).to(device)
    target_B = torch.randint(1000, (batch,), generator=draw).to(device)
    method = build(case.method, model, layer=case.layer, **case.options)
    work = Work(model, x_BCHW, target_B, method)
    given = target_B if method.needs_target else None
    sides: dict[str, Callable[[], Any]] = {
        "saltern": lambda: method(x_BCHW, given),
        "limit": partial(_limit, case, work),
        **_peers(case, method, model, x_BCHW, target_B),
    }
    rounds = _rounds(sides, batch, bench)
    memory = {name: peak_bytes(side, bench.device) / 1e6 / batch for name, side in sides.items()}
    rough = _bf16(case, model, x_BCHW, target_B, bench)
    return _entry(case, bench, batch, rounds, memory, rough)


def _peers(
    case: Case, method: Method, model: nn.Module, x_BCHW: Tensor, target_B: Tensor
) -> dict[str, Callable[[], Any]]:
    layer = model.get_submodule(method.layer[0]) if method.layer else None
    made: dict[str, Call] = {
        name: make(model, layer, method.options)
        for name, make in PEERS.get(case.method, {}).items()
        if find_spec(_IMPORTED_AS[name])
    }
    return {name: partial(call, x_BCHW, target_B) for name, call in made.items()}


def _bf16(case: Case, model: nn.Module, x_BCHW: Tensor, target_B: Tensor, bench: Bench) -> dict[str, list[float]]:
    """The method and its limit, both under autocast and channels_last."""
    model = model.to(memory_format=torch.channels_last)
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    method = build(case.method, model, layer=case.layer, **case.options)
    work = Work(model, x_BCHW, target_B, method)

    def under_autocast(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(x_BCHW.device.type, torch.bfloat16):
                return call()

        return run

    given = target_B if method.needs_target else None
    sides = {
        "saltern": under_autocast(lambda: method(x_BCHW, given)),
        "limit": under_autocast(partial(_limit, case, work)),
    }
    return _rounds(sides, len(x_BCHW), bench)


def _rounds(sides: dict[str, Callable[[], Any]], batch: int, bench: Bench) -> dict[str, list[float]]:
    """ms an image of every side, a round each, by turns."""
    timed = {name: _timed(side, batch, bench.device) for name, side in sides.items()}
    return dict(zip(timed, by_turns(bench.rounds, *timed.values()), strict=True))


def _timed(side: Callable[[], Any], batch: int, device: str) -> Callable[[], float]:
    def once() -> float:
        since = time.perf_counter()
        side()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - since

    once()  # warm
    repeats = max(1, round(_ENOUGH_S / once()))

    def run() -> float:
        return 1000 * sum(once() for _ in range(repeats)) / repeats / batch

    return run


def _entry(
    case: Case,
    bench: Bench,
    batch: int,
    rounds: dict[str, list[float]],
    memory: dict[str, float],
    rough: dict[str, list[float]],
) -> dict[str, Any]:
    ms = {name: median(values) for name, values in rounds.items()}
    ours, bf16 = ms["saltern"], median(rough["saltern"])
    peers = [name for name in rounds if name not in ("saltern", "limit")]
    return {
        "method": case.method,
        "model": case.model or bench.model,
        "layer": case.layer,
        "batch": batch,
        "limit": case.said,
        "goal": case.goal,
        "ms": ours,
        "over_limit": ours / ms["limit"],
        "peer_goal": case.peer_goal,
        "peers_over_ours": {name: ms[name] / ours for name in peers},
        "bf16_ms": bf16,
        "bf16_over_limit": bf16 / median(rough["limit"]),
        "fp32_peers_over_bf16": {name: ms[name] / bf16 for name in peers},
        "peak_mb": memory,
        "rounds": rounds,
        "bf16_rounds": rough,
    }


def as_table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as a Markdown table."""
    lines = [
        "| method | limit | ms an image | / limit | peers / ours | bf16 ms | / limit | peak MB an image (peers) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        where = ", ".join(filter(None, (entry["layer"], entry["model"] if entry["model"] != "resnet50" else None)))
        name = f"{entry['method']} ({where})" if where else entry["method"]
        peers = ", ".join(f"{peer} {value:.2f} x" for peer, value in entry["peers_over_ours"].items()) or "-"
        memory = entry["peak_mb"]
        others = ", ".join(f"{value:.0f}" for name, value in memory.items() if name not in ("saltern", "limit"))
        lines.append(
            f"| {name} | {entry['limit']} | {entry['ms']:.1f} | {_held(entry['over_limit'], entry['goal'])} | {peers} "
            f"| {entry['bf16_ms']:.1f} | {_held(entry['bf16_over_limit'], entry['goal'])} "
            f"| {memory['saltern']:.0f}{f' ({others})' if others else ''} |"
        )
    return "\n".join(lines) + "\n"


def _held(value: float, goal: float | None) -> str:
    if goal is None:
        return f"{value:.2f}"
    return f"{value:.2f} (<= {goal})" if value <= goal else f"**{value:.2f}** (<= {goal})"
