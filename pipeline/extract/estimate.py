"""Estimate the time and the output of a run, by extracting a few dozen images into a temporary folder."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow.parquet as pq

from saltern.pipeline.engine.conduct import Jobs
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.extract.request import ExtractRequest, reading
from saltern.pipeline.machine import decode_threads, pick_device
from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.runs.outlet import Made, Spec
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import list_keys
from saltern.schemas.errors import UserError
from saltern.schemas.run import Run, Shard
from saltern.schemas.text import in_bytes, in_time

COUNTED = 16  # shards whose samples are counted; the samples of the others are estimated from their bytes
TRIED = 64  # images extracted
LONG_S = 600.0  # of a shard: a shard is the unit of resume


@dataclass(frozen=True)
class Plan:
    """The estimate for a run. Fields are None if no model was named."""

    shards: int
    input_bytes: int
    samples: int
    samples_exact: bool
    images_per_s: float | None = None  # of one worker on this machine, by all methods together
    hours: float | None = None
    output_bytes: int | None = None
    bytes_by_method: dict[str, int] = field(default_factory=dict)  # of several methods, which share what they can

    def table(self) -> str:
        about = "" if self.samples_exact else "about "
        lines = [
            f"shards   {self.shards:,} ({in_bytes(self.input_bytes)})",
            f"samples  {about}{self.samples:,}",
        ]
        if self.hours is None or self.output_bytes is None:
            lines.append("time     give --model and --method to estimate it")
        else:
            several = f", all {len(self.bytes_by_method)} methods together" * bool(self.bytes_by_method)
            rate = f"{self.images_per_s:,.1f} images/s per worker{several}"
            lines.append(f"time     about {in_time(3600 * self.hours)} at {rate}")
            each = ", ".join(f"{name} {in_bytes(size)}" for name, size in self.bytes_by_method.items())
            lines.append(f"output   about {in_bytes(self.output_bytes)}{each and f': {each}'}")
            lines += self._long_shards(self.images_per_s or 0.0)
        return "\n".join(lines)

    def _long_shards(self, rate: float) -> list[str]:
        """Return a line if a stop loses much, because a shard takes long."""
        seconds = self.samples / self.shards / rate if rate else 0.0
        if seconds <= LONG_S:
            return []
        each = in_time(seconds)
        fit = f"`saltern pack --per-shard {max(1, round(LONG_S / 2 * rate))}` makes them last {in_time(LONG_S / 2)}"
        return [f"resume   a shard takes about {each}, which each stop or lost worker costs again; {fit}"]


def estimate(request: ExtractRequest, device: str, workers: int) -> tuple[Plan, list[str]]:
    """Count samples; if a model is named, extract a few images of the first shard and project time and bytes.

    Raises:
        UserError: a shard, the model or the method is not available.
    """
    shards, hints = expand(request.shards)
    with reading():
        samples, exact = count(shards)
    plan = Plan(len(shards), sum(shard.size for shard in shards), samples, exact)
    if not request.model:
        return plan, hints
    with reading():
        rate, tried = _try(replace(request, shards=[shards[0].url], limit=TRIED), pick_device(device))
    hours = samples / rate / workers / 3600
    output = {name: round(samples * row + len(shards) * file) for name, (row, file) in tried.items()}
    each = output if len(output) > 1 else {}
    made = replace(plan, images_per_s=rate, hours=hours, output_bytes=sum(output.values()), bytes_by_method=each)
    return made, hints


def count(shards: Sequence[Shard]) -> tuple[int, bool]:
    """Return the number of samples in the shards, and whether it is exact."""
    step = max(1, -(-len(shards) // COUNTED))
    counted = shards[::step]
    samples = sum(len(list_keys(shard)) for shard in counted)
    if step == 1:
        return samples, True
    size = sum(shard.size for shard in counted)
    return round(samples * sum(shard.size for shard in shards) / size) if size else 0, False


def _try(request: ExtractRequest, device: str) -> tuple[float, dict[str, tuple[float, int]]]:
    """Return images/s of all methods together, and by method the stored bytes per image and other bytes of a file."""
    job = extraction(request)
    with tempfile.TemporaryDirectory(prefix="saltern-plan-") as root:

        def spec(run: Run) -> Spec:
            return Spec(run, root, ".", device, decode_threads())

        earlier: Mapping[str, None] | None = None
        if isinstance(job, Jobs):
            runs, _ = job.plan(dict.fromkeys(job.names), device, 1)
            run, processor = runs[job.names[0]], job.processor({name: spec(each) for name, each in runs.items()})
            earlier = dict.fromkeys(job.names)
        else:
            run, _ = job.plan(None, device, 1)
            processor = job.processor(spec(run))
        processor.process(run.shards[0], earlier)  # the first time includes set-up
        since = time.perf_counter()
        made = processor.process(run.shards[0], earlier)
        seconds = time.perf_counter() - since
        processor.close()
        if not made.receipt.samples:
            raise UserError(f"{run.shards[0].url} holds no samples to try; put another shard first")
        return made.receipt.samples / seconds, {name: _bytes(root, part) for name, part in made.parts.items()}


def _bytes(root: str, made: Made) -> tuple[float, int]:
    """Return the stored bytes per image and the other bytes of a file."""
    receipt = made.receipt
    footer = pq.read_metadata(f"{root}/{made.files[data_name(receipt.shard)]}")
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    columns = (group.column(index) for group in groups for index in range(group.num_columns))
    stored = sum(column.total_compressed_size for column in columns)
    return stored / receipt.samples, receipt.data_bytes - stored
