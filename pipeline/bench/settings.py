"""What a bench measures on."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.prepare import BATCH_SIZE, Request, cores


@dataclass(frozen=True)
class Settings:
    """Sizes of the work; the defaults take about eight minutes on two cores."""

    command: Sequence[str]  # that runs `saltern`
    model: str = "resnet50"
    weights: str = "none"
    method: str = "grad-cam"
    precision: str = "fp32"
    batch_size: int | None = None
    device: str = "cpu"  # cpu | cuda
    rounds: int = 5
    seconds: float = 6.0  # of each side in each round, about
    stored_images: int = 512  # at most, whose bytes are counted
    few_shards: int = 10  # memory: few against many
    many_shards: int = 200
    done_shards: int = 100_000  # resume
    loop_shards: int = 5_000  # of the driver's loop, a round

    @property
    def batch(self) -> int:
        return self.batch_size or BATCH_SIZE[self.device]

    def request(self) -> Request:
        """The run that is measured, on shards that are given later."""
        return Request(
            shards=(),
            model=self.model,
            method=self.method,
            weights=self.weights,
            precision=self.precision,
            target="top1",
            batch_size=self.batch,
        )


NOOP = Request(shards=(), model="pipeline.bench.noop:net", method="pipeline.bench.noop:Noop", target="top1")


@dataclass(frozen=True)
class Layout:
    """Who gets the cores."""

    name: str
    torch_threads: int
    decode_threads: int


def layouts(device: str, bound: str) -> list[Layout]:
    """One core left to the other side of the pipeline, and all cores to both; a GPU needs no cores.

    Args:
        device: cpu | cuda.
        bound: model | decode, the side that the run waits for.
    """
    every = cores()
    spared = max(1, every - 1)
    if device == "cuda" and bound == "model":
        return [Layout("on the GPU", 1, min(16, every))]
    found = [Layout(f"both on all {every} cores", every if bound == "model" else 1, every)]
    if spared < every:
        threads = (spared, every - spared) if bound == "model" else (1, spared)
        found.insert(0, Layout(f"one of {every} cores left to the rest", *threads))
    return found
