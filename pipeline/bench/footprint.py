"""Measurements of a run's other costs: bytes stored, memory, resume, the driver's loop, the command's start."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from saltern.pipeline.bench.figures import Figure, by_turns, ratio
from saltern.pipeline.bench.workload import ExtractBench, NullBook, Supply, make_shards, spec_for
from saltern.pipeline.engine.driver import Driver
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import resolve
from saltern.pipeline.machine import cores
from saltern.pipeline.runs.manifest import data_name, receipt_name
from saltern.pipeline.runs.writer import ShardWriter, read_records
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import PHASES, Receipt
from saltern.schemas.run import Shard

_HEAVY = ("torch", "ray", "pyarrow", "webdataset")
IMAGENET = 1_281_167  # images of its training set
# A process starts with the peak of its parent, so that a small process must start the command.
_LAUNCH = """
import json, os, subprocess, sys, time
since = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
said = process.stderr.read()
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - since, used.ru_maxrss, status, said.decode()[-300:]]))
"""


def timed(words: Sequence[str]) -> tuple[float, float]:
    """Run a command. Returns its seconds and its peak resident memory in MB. Raises UserError if it fails."""
    ended = subprocess.run([sys.executable, "-c", _LAUNCH, *words], check=True, capture_output=True)
    seconds, peak_kb, status, said = json.loads(ended.stdout)
    if status:
        raise UserError(f"cannot measure: `{' '.join(words)}` failed: {said}")
    return seconds, peak_kb * 1024 / 1e6


def _extract(bench: ExtractBench, shards: Path, out: Path) -> list[str]:
    noop = bench.noop()
    words = ["extract", str(shards), "--out", str(out), "--model", noop.model, "--method", noop.method]
    return [*bench.command, *words, "--target", noop.target, "--engine", "local", "--device", "cpu"]


def stored(bench: ExtractBench, supply: Supply) -> Figure:
    """Measure the bytes of masks and native maps in one data file of all the images."""
    with spec_for(bench.request(), bench.device, cores(), cores()) as spec:
        processor, rows = Processor(spec, Extraction), []
        for shard in supply.images(min(bench.stored_images, sum(supply.samples))):
            processor.process(shard)
            path = Path(spec.root, data_name(shard.name))
            rows += [row for sample in read_records(path).values() for row in sample]
        with ShardWriter(Path(spec.scratch), pq.read_schema(path)) as writer:
            writer.write(rows)
            each = writer.close().size / len(rows)
    weights = "random weights" if bench.weights == "none" else f"weights {bench.weights}"
    pictures = "made pictures" if bench.made else "photographs"
    note = (
        f"{each:.0f} bytes an image in a file of {len(rows)} rows, x {IMAGENET:,}; {bench.method} of {bench.model}, "
        f"{weights}, {pictures}"
    )
    miss = f"an image may take {1e9 / IMAGENET:.0f} bytes"
    name = "stored, ImageNet's training set, masks + native maps"
    return Figure(name, each * IMAGENET / 1e9, 1.0, "GB", False, note, miss)


def memory(bench: ExtractBench) -> Figure:
    """Compare the peak memory of a run over many shards to that over few."""
    few, many = bench.few_shards, bench.many_shards
    with TemporaryDirectory(prefix="saltern-bench-") as folder:
        make_shards(Path(folder, "few"), few, 16)
        Path(folder, "many").mkdir()
        for number in range(many):  # copies, because two links to one file are one shard
            shutil.copyfile(
                Path(folder, "few", f"shard-{number % few:06}.tar"), Path(folder, "many", f"{number:06}.tar")
            )

        def peak(shards: str) -> float:
            with TemporaryDirectory(dir=folder) as out:
                return timed(_extract(bench, Path(folder, shards), Path(out, "run")))[1]

        peaks = by_turns(bench.rounds, lambda: peak("many"), lambda: peak("few"))
    note = f"{median(peaks[0]):.0f} ÷ {median(peaks[1]):.0f} MB, whole `saltern extract` with a no-op method"
    name = f"peak memory, {many} shards ÷ {few} shards"
    miss = f"{median(peaks[0]) - median(peaks[1]):.0f} MB more over {many - few} shards"
    return Figure(name, ratio(*peaks), 1.05, "x", False, note, miss, {"many": peaks[0], "few": peaks[1]})


def resume(bench: ExtractBench) -> list[Figure]:
    """Measure `saltern extract` on a run whose shards are all done: seconds and memory."""
    count = bench.done_shards
    with TemporaryDirectory(prefix="saltern-bench-") as folder:
        shards, out = Path(folder, "shards"), Path(folder, "run")
        _make_done(bench, shards, out, count)
        taken = [timed(_extract(bench, shards, out)) for _ in range(bench.rounds)]
    seconds, peaks_gb = [time for time, _ in taken], [peak / 1e3 for _, peak in taken]
    name = f"plan and resume {count:,} done shards"
    note = "whole `saltern extract`, imports included"
    slow = "listing the shards, reading their receipts and importing torch add up"
    large = "importing torch, the shards and their receipts add up"
    return [
        Figure(name, median(seconds), 10.0, "s", False, note, slow, {"s": seconds}),
        Figure(f"{name}, peak memory", median(peaks_gb), 1.0, "GB", False, note, large, {"GB": peaks_gb}),
    ]


def _make_done(bench: ExtractBench, shards: Path, out: Path, count: int) -> None:
    """Write tars that a resume only lists, and their receipts."""
    for number in range(count):
        path = shards / f"{number // 1000:03}" / f"{number:06}.tar"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(b"\0")
    run, _ = resolve(replace(bench.noop(), shards=[str(shards)], batch_size=None), None, "cpu", 1)
    for shard in run.shards:
        path = out / receipt_name(shard.name)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        path.write_bytes(_receipt(shard, run.fingerprint).to_json())
    (out / "run.json").write_bytes(run.to_json())


def _receipt(shard: Shard, fingerprint: str = "") -> Receipt:
    seconds = {**dict.fromkeys(PHASES, 1.0), "total": 4.0}
    return Receipt(
        shard.name, shard.size, fingerprint, 1000, 1000, {"ok": 1000}, "0" * 64, 700_000, seconds, "host:1", 16
    )


class _Idle:
    """A processor that does nothing."""

    images = 0

    def process(self, shard: Shard, redo: bool = False) -> Receipt:
        return _receipt(shard)


def driver_loop(bench: ExtractBench) -> Figure:
    """Measure the driver and the local pool on shards with nothing to do."""
    shards = [Shard(f"{number:06}", "", 0) for number in range(bench.loop_shards)]

    def loop() -> float:
        since = time.perf_counter()
        Driver(LocalPool(_Idle), NullBook()).run(shards)
        return 1000 * (time.perf_counter() - since) / len(shards)

    (each,) = by_turns(bench.rounds, loop)
    note = f"{len(shards):,} shards, local engine"
    miss = "a thread is started for each shard, and the driver wakes for each"
    return Figure("driver loop, a shard", median(each), 1.0, "ms", False, note, miss, {"ms": each})


def start(bench: ExtractBench) -> Figure:
    """Measure `saltern --help`, and list the heavy packages that it imports."""
    python, *rest = bench.command
    (seconds,) = by_turns(bench.rounds, lambda: timed([python, *rest, "--help"])[0])
    ended = subprocess.run([python, "-X", "importtime", *rest, "--help"], check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    heavy = [name for name in _HEAVY if name in imported]
    note = f"imports {', '.join(heavy) or 'none of ' + ', '.join(_HEAVY)}"
    miss = f"the interpreter and typer take it; {note}"
    return Figure("`saltern --help`", median(seconds), 0.3, "s", False, note, miss, {"s": seconds})
