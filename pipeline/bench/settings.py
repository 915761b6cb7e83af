"""What a bench measures, on what, and who gets the cores."""

from collections.abc import Sequence
from dataclasses import dataclass

from saltern.pipeline.extract.request import BATCH_SIZE, Request, cores


@dataclass(frozen=True)
class Settings:
    """The defaults take about nine minutes on two cores."""

    command: Sequence[str]  # that runs `saltern`
    shards: Sequence[str] = ()  # as `extract` takes them
    made: bool = False  # they hold made pictures, no photographs
    model: str = "resnet50"
    weights: str = "none"
    method: str = "grad-cam"
    precision: str = "fp32"
    batch_size: int | None = None
    device: str = "cpu"  # cpu | cuda
    rounds: int = 5
    seconds: float = 6.0  # of each side in each round, about; half of it with the no-op method
    stored_images: int = 512  # at most, whose bytes are counted
    few_shards: int = 10  # memory: few against many
    many_shards: int = 200
    done_shards: int = 100_000  # resume
    loop_shards: int = 5_000  # of the driver's loop, each round

    @property
    def batch(self) -> int:
        return self.batch_size or BATCH_SIZE[self.device]

    def request(self) -> Request:
        """The run that is measured."""
        return Request(
            shards=self.shards,
            model=self.model,
            method=self.method,
            weights=self.weights,
            precision=self.precision,
            target="top1",
            batch_size=self.batch,
        )

    def noop(self) -> Request:
        """The same on a model and a method that do next to nothing."""
        return Request(
            shards=self.shards,
            model="saltern.pipeline.bench.noop:net",
            method="saltern.pipeline.bench.noop:Noop",
            target="top1",
            batch_size=self.batch,
        )


@dataclass(frozen=True)
class Layout:
    """Who gets the cores."""

    name: str
    torch_threads: int
    decode_threads: int


def layouts(device: str, bound: str) -> list[Layout]:
    """One core left to the rest of the pipeline, and all cores to what it waits for.

    Args:
        device: cpu | cuda; a GPU needs no cores.
        bound: model | decode, what the run waits for.
    """
    every = cores()
    threads = min(16, every)
    if device == "cuda" and bound == "model":
        return [Layout("GPU", 1, threads)]
    if bound == "model":
        shared = Layout(f"torch on {every} of {every} cores", every, threads)
        spared = Layout(f"torch on {every - 1} of {every} cores", every - 1, 1)
    else:
        shared = Layout(f"decode threads: {every} on {every} cores", 1, every)
        spared = Layout(f"decode threads: {every - 1} on {every} cores", 1, every - 1)
    return [spared, shared] if every > 1 else [shared]
