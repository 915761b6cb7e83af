"""Compare every method to the passes that it cannot avoid and to other libraries, in fp32 and in bf16.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.bench.figures import against_goal, compare, peak_bytes
from saltern.pipeline.bench.peers import Problem, peers_of
from saltern.pipeline.device import arithmetic
from saltern.pipeline.methods import build
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.passes import frozen
from saltern.pipeline.models.taps import Taps
from saltern.pipeline.tables import markdown_table
from saltern.schemas.sizes import square_of


@dataclass(frozen=True)
class Passes:
    """Forward passes, each followed by the same number of backward passes."""

    forwards: int = 1  # an image
    backwards: int = 0  # after each forward pass
    to_layer: bool = False  # backward passes end at the method's layer, not at the pixels
    size: int | None = None  # pixels; None: the batch's own


@dataclass(frozen=True)
class Case:
    """A method, the passes that it cannot avoid, and the goal for the ratio of both."""

    method: str
    goal: float | None = None  # of method ÷ limit
    limit: Sequence[Passes] = (Passes(),)
    model: str | None = None  # None: the bench's
    layer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batch: int | None = None  # if the bench's would take too long


_TO_LAYER, _TO_PIXELS = (Passes(backwards=1, to_layer=True),), (Passes(backwards=1),)
_EIGHT_STEPS = (Passes(), Passes(8, backwards=1))  # logits of the clean image, then the points
_CAMERAS = tuple(Passes(backwards=1, to_layer=True, size=size) for size in (None, *range(324, 1000, 100)))
CASES = [
    *(Case(name, 1.05) for name in ("cam", "grad-cam", "grad-cam++", "layer-cam", "hires-cam")),
    *(Case(name, 1.05) for name in ("xgrad-cam", "eigen-cam")),
    Case("grad-cam", 1.05, _TO_LAYER, layer="layer2"),
    *(Case(name, 1.10, _TO_PIXELS) for name in ("gradient", "deconvnet", "guided-backprop", "guided-grad-cam")),
    Case("input-x-gradient", 1.10, _TO_PIXELS),
    Case("shapley-cam", 1.10, (Passes(backwards=2, to_layer=True),)),
    Case("fullgrad", 1.10, _TO_PIXELS),
    *(Case(name, 1.10, model="vit_b_16", batch=4) for name in ("attention", "rollout", "grad-eclip")),
    *(Case(name, 1.10, _TO_PIXELS, model="vit_b_16", batch=4) for name in ("chefer", "legrad")),
    Case("integrated-gradients", 1.10, _EIGHT_STEPS, options={"steps": 8}, batch=8),
    Case("smoothgrad", 1.10, _EIGHT_STEPS, options={"samples": 8}, batch=8),
    Case("occlusion", 1.05, (Passes(), Passes(36)), options={"window": 64, "stride": 32}, batch=4),
    Case("score-cam", 1.10, (Passes(), Passes(64)), model="resnet18", layer="layer1", batch=2),
    Case("ablation-cam", model="resnet18", layer="layer2", batch=2),
    Case("relevance-cam", 1.5, (Passes(backwards=2, to_layer=True),), layer="layer2"),
    Case("lrp", None, (Passes(backwards=2),)),
    Case("cameras", 1.2, _CAMERAS, batch=2),
]


@dataclass(frozen=True)
class MethodsBench:
    """Options of the measurement."""

    model: str = "resnet50"
    device: str = "cpu"
    batch_size: int = 16
    rounds: int = 5
    only: Sequence[str] = ()  # methods; empty: all


def measure(bench: MethodsBench, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield one entry a case: ms an image, ratios, peak memory in MB an image, and every round."""
    for case in CASES:
        if not bench.only or case.method in bench.only:
            say(f"{case.method} {case.layer or ''}")
            yield _measure(case, bench)
            gc.collect()


def _measure(case: Case, bench: MethodsBench) -> dict[str, Any]:
    problem = _problem(case, bench, torch.contiguous_format)
    batch = len(problem.x_BCHW)
    calls = _calls(case, problem) | {name: partial(peer, problem) for name, peer in peers_of(case.method).items()}
    with arithmetic("fp32"):
        fp32 = compare(calls, batch, bench.device, bench.rounds)
        peak = {name: peak_bytes(call, bench.device) / 1e6 / batch for name, call in calls.items()}
    problem = _problem(case, bench, torch.channels_last)
    problem.method.halve(problem.x_BCHW[:1], torch.bfloat16)
    calls = _calls(case, problem, torch.bfloat16)
    if bench.device == "cuda":
        calls |= {"free": partial(_freely, calls["saltern"])}
    with arithmetic("bf16"):
        bf16 = compare(calls, batch, bench.device, bench.rounds)
    ours = fp32["saltern"].ms
    return {
        "method": case.method,
        "model": case.model or bench.model,
        "layer": case.layer,
        "batch": batch,
        "limit": _limit_text(case.limit, problem.method.layer),
        "goal": case.goal,
        "ms": ours,
        "over_limit": ours / fp32["limit"].ms,
        "peers_over_ours": {name: fp32[name].ms / ours for name in list(fp32)[2:]},
        "bf16_ms": bf16["saltern"].ms,
        "bf16_over_limit": bf16["saltern"].ms / bf16["limit"].ms,
        "bf16_over_free": bf16["saltern"].ms / bf16["free"].ms if "free" in bf16 else None,
        "peak_mb": peak,
        "rounds": {name: times.rounds for name, times in fp32.items()},
        "bf16_rounds": {name: times.rounds for name, times in bf16.items()},
    }


def _problem(case: Case, bench: MethodsBench, layout: torch.memory_format) -> Problem:
    classifier = classifiers.load(case.model or bench.model, "none")
    model, side = classifier.model.to(bench.device).to(memory_format=layout), square_of(classifier.preprocess.crop)
    batch = min(case.batch or bench.batch_size, bench.batch_size)
    draw = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(batch, 3, side, side, generator=draw).to(bench.device).contiguous(memory_format=layout)
    target_B = torch.randint(classifier.classes, (batch,), generator=draw).to(bench.device)
    return Problem(model, build(case.method, model, layer=case.layer, **case.options), x_BCHW, target_B)


def _calls(case: Case, problem: Problem, dtype: torch.dtype | None = None) -> dict[str, Callable[[], object]]:
    """Return the method and its limit, both under autocast if a dtype is given."""
    autocast = partial(torch.autocast, problem.x_BCHW.device.type, dtype, enabled=dtype is not None)
    target_B = problem.target_B if problem.method.needs_target else None

    def method() -> None:
        with autocast():
            problem.method(problem.x_BCHW, target_B)

    def limit() -> None:
        with autocast(), frozen(problem.model):
            for passes in case.limit:
                run_passes(problem, passes)

    return {"saltern": method, "limit": limit}


def run_passes(problem: Problem, passes: Passes) -> None:
    """Run the passes for each image of the batch, in chunks as large as the method's option `chunk`."""
    x_BCHW, chunk = problem.x_BCHW, problem.method.options.get("chunk", 0)
    if passes.size is not None:
        x_BCHW = F.interpolate(x_BCHW, (passes.size, passes.size), mode="bicubic")
    repeats = min(passes.forwards, max(1, chunk // len(x_BCHW)))
    for done in range(0, passes.forwards, repeats):
        times = min(repeats, passes.forwards - done)
        _run_once(problem, x_BCHW.repeat(times, 1, 1, 1) if times > 1 else x_BCHW, passes)


def _run_once(problem: Problem, x_BCHW: Tensor, passes: Passes) -> None:
    if not passes.backwards:
        with torch.no_grad():
            problem.model(x_BCHW)
        return
    if passes.to_layer:
        logits_BK, inputs = Taps(problem.model, problem.method.layer).forward(x_BCHW, differentiable=True)
    else:
        inputs = [x_BCHW.detach().requires_grad_()]
        logits_BK = problem.model(*inputs)
    target_B = problem.target_B.repeat(len(x_BCHW) // len(problem.target_B))
    score = logits_BK.gather(1, target_B[:, None]).sum()
    for left in reversed(range(passes.backwards)):
        torch.autograd.grad(score, inputs, retain_graph=left > 0)


def _freely(call: Callable[[], object]) -> None:
    """Call with operations that need not repeat to the bit."""
    with arithmetic("bf16", deterministic=False):
        call()


def _limit_text(limit: Sequence[Passes], layer: Sequence[str]) -> str:
    counts = {
        "forward": sum(passes.forwards for passes in limit),
        "backward": sum(passes.forwards * passes.backwards for passes in limit),
    }
    text = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count)
    return f"{text} to {layer[0]}" if limit[0].to_layer else text


def as_table(entries: Sequence[dict[str, Any]]) -> str:
    """Return the entries as a Markdown table."""
    heads = ["method", "limit", "ms an image", "/ limit", "peers / ours", "bf16 ms", "/ limit", "/ not deterministic"]
    return markdown_table([*heads, "peak MB an image (peers)"], map(_cells, entries))


def _cells(entry: dict[str, Any]) -> list[str]:
    where = ", ".join(filter(None, (entry["layer"], entry["model"] if entry["model"] != "resnet50" else None)))
    peers, peak = entry["peers_over_ours"], entry["peak_mb"]
    return [
        f"{entry['method']} ({where})" if where else entry["method"],
        entry["limit"],
        f"{entry['ms']:.1f}",
        against_goal(entry["over_limit"], entry["goal"]),
        ", ".join(f"{peer} {value:.2f} x" for peer, value in peers.items()) or "-",
        f"{entry['bf16_ms']:.1f}",
        against_goal(entry["bf16_over_limit"], entry["goal"]),
        f"{entry['bf16_over_free']:.3f}" if entry["bf16_over_free"] else "-",
        f"{peak['saltern']:.0f}" + (f" ({', '.join(f'{peak[peer]:.0f}' for peer in peers)})" if peers else ""),
    ]
