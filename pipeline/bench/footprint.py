"""Measurements of a run's other costs: bytes stored, memory, resume, the driver's loop, the command's start."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from saltern.pipeline.bench.commands import run_command
from saltern.pipeline.bench.figures import Figure, by_turns, ratio
from saltern.pipeline.bench.workload import NOOP, ExtractBench, write_shards
from saltern.pipeline.engine.driver import Driver
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.runs.manifest import data_name, receipt_name
from saltern.pipeline.runs.outlet import Made
from saltern.schemas.receipt import PHASES, Failure, Receipt
from saltern.schemas.run import Shard

IMAGENET = 1_281_167  # images of its training set
_HEAVY = ("torch", "ray", "pyarrow", "webdataset")


def stored(bench: ExtractBench, shard: Path) -> Figure:
    """Measure the bytes of masks and native maps in the data file of one shard."""
    with TemporaryDirectory(dir=shard.parent) as out:
        run_command([*bench.extract(shard), "--out", out])
        (path,) = Path(out, "receipts").rglob("*.json")
        receipt = Receipt.from_json(path.read_bytes())
    each = receipt.data_bytes / receipt.rows
    weights = "random weights" if bench.weights == "none" else f"weights {bench.weights}"
    note = f"{each:.0f} bytes an image in a file of {receipt.rows} rows, x {IMAGENET:,}; {bench.method} of "
    note += f"{bench.model}, {weights}, {'photographs' if bench.shards else 'made pictures'}"
    miss = f"an image may take {1e9 / IMAGENET:.0f} bytes"
    name = "stored, ImageNet's training set, masks + native maps"
    return Figure(name, each * IMAGENET / 1e9, 1.0, "GB", False, note, miss)


def memory(bench: ExtractBench, folder: Path, images: Sequence[bytes]) -> Figure:
    """Compare the peak memory of a run over many shards to that over few."""
    few, many = bench.few_shards, bench.many_shards

    def peak(shards: int) -> float:
        with TemporaryDirectory(dir=folder) as out:
            words = bench.extract(folder / f"shards-{shards}", noop=True, device="cpu")
            return run_command([*words, "--out", out]).peak_mb

    for shards in (few, many):
        write_shards(folder / f"shards-{shards}", images, shards, 16)
    peaks = by_turns(bench.rounds, lambda: peak(many), lambda: peak(few))
    note = f"{median(peaks[0]):.0f} ÷ {median(peaks[1]):.0f} MB, whole `saltern extract` with a no-op method"
    name = f"peak memory, {many} shards ÷ {few} shards"
    miss = f"{median(peaks[0]) - median(peaks[1]):.0f} MB more over {many - few} shards"
    return Figure(name, ratio(*peaks), 1.05, "x", False, note, miss, {"many": peaks[0], "few": peaks[1]})


def resume(bench: ExtractBench, folder: Path) -> list[Figure]:
    """Measure `saltern extract` on a run whose shards are all done: seconds and memory."""
    shards, out = folder / "done", folder / "run"
    _make_done(bench, shards, out)
    words = [*bench.extract(shards, noop=True, device="cpu"), "--out", str(out)]
    seconds, peaks_mb = zip(*(run_command(words) for _ in range(bench.rounds)), strict=True)
    peaks_gb = [peak / 1e3 for peak in peaks_mb]
    name = f"plan and resume {bench.done_shards:,} done shards"
    note = "whole `saltern extract`, imports included"
    slow = "listing the shards, reading their receipts and importing torch add up"
    large = "importing torch, the shards and their receipts add up"
    return [
        Figure(name, median(seconds), 10.0, "s", False, note, slow, {"s": list(seconds)}),
        Figure(f"{name}, peak memory", median(peaks_gb), 1.0, "GB", False, note, large, {"GB": peaks_gb}),
    ]


def _make_done(bench: ExtractBench, shards: Path, out: Path) -> None:
    """Write tars and data files that a resume only lists, and their receipts."""
    for number in range(bench.done_shards):
        path = shards / f"{number // 1000:03}" / f"{number:06}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0")
    request = ExtractRequest(shards=[str(shards)], target="top1", batch_size=bench.batch, **NOOP)
    run, _ = resolve(request, None, "cpu", 1)
    for shard in run.shards:
        contents = {data_name(shard.name): b"\0", receipt_name(shard.name): _receipt(shard, run.fingerprint).to_json()}
        for name, content in contents.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    (out / "run.json").write_bytes(run.to_json())


def _receipt(shard: Shard, fingerprint: str = "") -> Receipt:
    seconds = {**dict.fromkeys(PHASES, 1.0), "total": 4.0}
    return Receipt(shard.name, shard.size, fingerprint, 1000, 1000, {"ok": 1000}, "0" * 64, 1, seconds, "host:1", 16)


class _Idle:
    """A processor that does nothing, and a book that records nothing."""

    def __init__(self) -> None:
        self.images: dict[str, int] = {}

    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made:
        return Made(_receipt(shard), {})

    def close(self) -> None: ...

    def publish(self, made: Made) -> Receipt:
        return made.receipt

    def failed(self, failure: Failure) -> None: ...


def driver_loop(bench: ExtractBench) -> Figure:
    """Measure the driver and the local pool on shards with nothing to do."""
    shards = [Shard(f"{number:06}", "", 0) for number in range(bench.loop_shards)]

    def loop() -> float:
        since = time.perf_counter()
        Driver(LocalPool(_Idle), _Idle()).run(shards)
        return 1000 * (time.perf_counter() - since) / len(shards)

    (each,) = by_turns(bench.rounds, loop)
    note = f"{len(shards):,} shards, local engine"
    miss = "a thread is started for each shard, and the driver wakes for each"
    return Figure("driver loop, a shard", median(each), 1.0, "ms", False, note, miss, {"ms": each})


def start(bench: ExtractBench) -> Figure:
    """Measure `saltern --help`, and list the heavy packages that it imports."""
    python, *rest = bench.command
    (seconds,) = by_turns(bench.rounds, lambda: run_command([python, *rest, "--help"]).seconds)
    ended = subprocess.run([python, "-X", "importtime", *rest, "--help"], check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    heavy = [name for name in _HEAVY if name in imported]
    note = f"imports {', '.join(heavy) or 'none of ' + ', '.join(_HEAVY)}"
    miss = f"the interpreter and typer take it; {note}"
    return Figure("`saltern --help`", median(seconds), 0.3, "s", False, note, miss, {"s": seconds})
