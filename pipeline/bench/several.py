"""The gain of several methods in one command over one command each, without their starts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from saltern.pipeline.bench.figures import Figure, by_turns, ratio
from saltern.pipeline.bench.workload import ExtractBench
from saltern.pipeline.extract.extraction import Extraction, extractions
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import ExtractRequest
from saltern.pipeline.extract.several import each_method, resolve_each
from saltern.pipeline.machine import cores
from saltern.pipeline.runs.outlet import Spec
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Shard

# Methods that share passes, and methods that share only reading, decoding and the model; with the goals.
SETS = {
    ("cam", "grad-cam", "grad-cam++", "xgrad-cam", "layer-cam", "hires-cam", "eigen-cam"): 5.0,
    ("gradient", "input-x-gradient"): 1.0,
}
_SHARDS = 2  # of a round


def gains(bench: ExtractBench, shards: Path) -> list[Figure]:
    """Measure the gain of each set of methods.

    Args:
        shards: a folder of them.
    """
    return [_gain(bench, shards, names, goal) for names, goal in SETS.items()]


def _gain(bench: ExtractBench, shards: Path, names: Sequence[str], goal: float) -> Figure:
    request = ExtractRequest(
        shards=[str(path) for path in sorted(shards.glob("*.tar"))[:_SHARDS]],
        model=bench.model,
        method=",".join(names),
        weights=bench.weights,
        precision=bench.precision,
        batch_size=bench.batch,
        target="top1",
    )
    runs, _ = resolve_each(each_method(request), dict.fromkeys(names), bench.device, 1)
    wanted = next(iter(runs.values())).shards
    with TemporaryDirectory(prefix="saltern-bench-") as root:
        specs = {}
        for name, run in runs.items():
            Path(root, name).mkdir()
            specs[name] = Spec(replace(run, shards=[]), f"{root}/{name}", ".", bench.device, cores())
        together = Processor(specs, extractions)
        single = [Processor(spec, Extraction) for spec in specs.values()]
        lacking: dict[str, Receipt | None] = dict.fromkeys(names)
        try:
            one, each = by_turns(
                bench.rounds,
                _timed(bench.device, wanted, lambda shard: together.process(shard, lacking).receipt.samples),
                _timed(bench.device, wanted, lambda shard: max(each.process(shard).receipt.samples for each in single)),
            )
        finally:
            for processor in (together, *single):
                processor.close()
    kind = "core-ms" if bench.device == "cpu" else "ms"
    note = f"{median(each):.1f} ÷ {median(one):.1f} {kind} an image, {bench.model}: {', '.join(names)}"
    name = f"{len(names)} methods one by one ÷ in one command, {names[0]} and others"
    rounds = {"one by one": each, "in one command": one}
    return Figure(name, ratio(each, one), goal, "x", True, note, "maps, masks and files are made for each", rounds)


def _timed(device: str, shards: Sequence[Shard], work: Callable[[Shard], int]) -> Callable[[], float]:
    """Return a measurement of milliseconds an image: on a CPU of all cores together, else of the clock."""
    clock = time.process_time if device == "cpu" else time.perf_counter

    def measured() -> float:
        since = clock()
        images = sum(work(shard) for shard in shards)
        return 1000 * (clock() - since) / images

    measured()  # warm up
    return measured
