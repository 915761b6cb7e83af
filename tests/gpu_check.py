"""Check Saltern on a GPU: maps, decoding, engines, rates, CASM. One line a check, and a JSON file with the figures.

    python tests/gpu_check.py --out gpu.json                  # on a GPU, at most 8 minutes
    python tests/gpu_check.py --device cpu --out cpu.json     # the same code on a CPU, smaller

It needs torch >= 2.11, torchvision, numpy, Pillow, pyarrow, opencv, safetensors and typer, and no network. Checks of
what is not installed, such as ray, are skipped with the reason; webdataset and braceexpand have stand-ins. The exit
code is 1 if a check failed.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_paths  # first: it makes the others visible
import torch
from gpu_maps import Place, Skip, compiled, maps_exact, maps_repeat, precisions

from saltern.pipeline.bench.commands import measure_run
from saltern.pipeline.bench.extract import decode_alone, method_alone
from saltern.pipeline.bench.workload import ExtractBench, make_images, write_shards
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import thinning_named
from saltern.pipeline.device import arithmetic
from saltern.pipeline.models import classifiers
from saltern.pipeline.shards.decoder import choose_decoder, make_decoder
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.resample import send
from saltern.pipeline.training.batches import Batches
from saltern.pipeline.training.index import make_index
from saltern.pipeline.training.loop import Normalise
from saltern.schemas.config import Preprocess

SALTERN = [sys.executable, "-m", "saltern"]
LIMIT_S = 480.0  # after which no further check begins
SHARDS, TRAINED = 6, 24  # shards of a run, steps of a training


def main() -> int:
    """Run all checks. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=[check.__name__ for check in CHECKS], metavar="CHECK")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu runs the same code on a CPU")
    lines, began = {}, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="saltern-check-") as folder:
        place = Place(given.device, Path(folder), make_images(64 if given.device == "cpu" else 512))
        for check in CHECKS:
            if not given.only or check.__name__ in given.only:
                late = given.device == "cuda" and time.perf_counter() - began > LIMIT_S
                lines[check.__name__] = one(too_late if late else check, place, check.__name__)
                report = {"where": where(given.device), "seconds": time.perf_counter() - began, "checks": lines}
                given.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(line["verdict"] == "FAILED" for line in lines.values()))


def too_late(place: Place) -> dict[str, Any]:
    """Take the place of a check for which no time is left."""
    raise RuntimeError(f"the checks before took more than {LIMIT_S:.0f} s: give its name to --only")


def one(check: Callable[[Place], dict[str, Any]], place: Place, name: str) -> dict[str, Any]:
    """Run a check, and print its line."""
    since, found = time.perf_counter(), {}
    try:
        found, verdict, reason = check(place), "ok", ""
    except Skip as skip:
        verdict, reason = "skipped", str(skip)
    except Exception as error:
        verdict, reason = "FAILED", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    seconds = time.perf_counter() - since
    shown = ", ".join(
        f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )
    print(f"{verdict:8}{name:22}{seconds:6.1f} s  {reason or shown}"[:240], flush=True)
    return {"verdict": verdict, "seconds": seconds, **({"reason": reason} if reason else {}), **found}


def where(device: str) -> dict[str, Any]:
    """Return the date, the machine and the versions."""
    versions = {}
    for name in ("torch", "torchvision", "torchcodec", "ray", "pillow", "pyarrow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    versions |= dict.fromkeys(gpu_paths.STANDING_IN, "a stand-in")
    return {"date": datetime.date.today().isoformat(), "gpu": gpu, "cores": os.cpu_count(), "versions": versions}


# --- decoding


def decoding(place: Place) -> dict[str, Any]:
    """All checks of tests/gpu_decode.py hold: pixels, resampling, repetition, damaged files, rates."""
    write_shards(place.folder / "jpeg", place.images, 1, len(place.images))
    script, found = Path(__file__).with_name("gpu_decode.py"), place.folder / "decode.json"
    words = [sys.executable, str(script), str(place.folder / "jpeg"), "--json", str(found)]
    subprocess.run([*words, "--seconds", "2" if place.small else "20"], timeout=place.patience_s)
    results = json.loads(found.read_text())["results"]
    assert all(result["passed"] for result in results), results
    return {result.pop("check"): result for result in results}


# --- engines


def call(place: Place, words: list[str], **environment: str) -> None:
    """Run a command to its end, which must be exit code 0."""
    limit = place.patience_s
    ended = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, timeout=limit)
    assert ended.returncode == 0, f"{' '.join(words)}: exit code {ended.returncode}: {ended.stderr[-300:]}"


def kill(place: Place, words: list[str], when: Callable[[], bool]) -> None:
    """Start a command, and kill it as soon as `when` says, before its end."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
        deadline = time.monotonic() + place.patience_s
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        said.seek(0)
        assert code == -signal.SIGKILL, f"{' '.join(words)}: ended before it was killed, {code}: {said.read()[-300:]}"


def run(place: Place, out: str, *more: str, **environment: str) -> dict[str, str]:
    """Extract the shards of the engines' checks; return the digests of the data files by name."""
    if not (place.folder / "engines").exists():
        write_shards(place.folder / "engines", place.images, SHARDS, 24 if place.small else 160)
    call(place, command(place, out, *more), **environment)
    return digests(place.folder / out)


def command(place: Place, out: str, *more: str) -> list[str]:
    """Return the command of an extraction."""
    words = f"{place.folder}/engines --out {place.folder}/{out} --model {place.models[0]} --weights none"
    words += f" --method grad-cam --target top1 --batch-size 8 --device {place.device}"
    words += f" --resize {place.side} --crop {place.side}" if place.small else ""
    return [*SALTERN, "extract", *words.split(), *more]


def digests(out: Path) -> dict[str, str]:
    files = sorted((out / "data").glob("*.parquet"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def local_engine(place: Place) -> dict[str, Any]:
    """Two local runs give equal files."""
    first, second = (run(place, f"local-{number}", "--engine", "local") for number in (1, 2))
    assert len(first) == SHARDS
    assert first == second
    return {"files": len(first)}


def ray_engine(place: Place) -> dict[str, Any]:
    """One actor, and four that share the GPU, give the files of the local engine."""
    if importlib.util.find_spec("ray") is None:
        raise Skip("ray is not installed")
    local = run(place, "local-1", "--engine", "local")
    share = [] if place.small else ["--gpus-per-worker", "0.25"]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    one = run(place, "ray-1", "--engine", "ray", "--workers", "1", OMP_NUM_THREADS=threads)
    many = run(
        place, "ray-4", "--engine", "ray", "--workers", "2" if place.small else "4", *share, OMP_NUM_THREADS=threads
    )
    assert one == many
    assert place.small or one == local  # on a CPU they have other torch threads
    return {"files": len(many)}


def killed_run(place: Place) -> dict[str, Any]:
    """A run that is killed after its first shard, and repeated, gives the files of an undisturbed run."""
    local = run(place, "local-1", "--engine", "local")
    out = place.folder / "killed"
    kill(place, command(place, "killed", "--engine", "local"), lambda: bool(list((out / "receipts").glob("*.json"))))
    done = len(list((out / "receipts").glob("*.json")))
    assert 0 < done < SHARDS, done
    assert run(place, "killed", "--engine", "local") == local
    return {"done before the kill": done}


# --- rates


def rates(place: Place) -> dict[str, Any]:
    """images/s of Grad-CAM alone, of decoding alone, and of a run."""
    bench = ExtractBench(
        SALTERN, model=place.models[0], precision="bf16" if not place.small else "fp32", device=place.device,
        batch_size=8 if place.small else 256, large_shards=24,
    )  # fmt: skip
    shards = write_shards(place.folder / "rates", place.images, *((6, 16) if place.small else (24, 1000)))
    found: dict[str, Any] = {"method": method_alone(bench, 1), "decode": decode_alone(shards, 2, place.device, 64)}
    found["run"] = measure_run(bench.extract(shards)).images_s
    found["run / slower"] = found["run"] / min(found["method"], found["decode"])
    return found


# --- CASM


def casm_resumes(place: Place) -> dict[str, Any]:
    """A CASM training that is killed and resumed ends with the weights of an undisturbed one."""
    shards = place.folder / "casm-shards"
    write_shards(shards, place.images, 2, 32)
    size = "64" if place.small else "128"
    words = f"--model {place.models[0]} --weights none --side {size} --batch-size 8"
    words += " --epochs 3 --steps-per-epoch 8 --checkpoint-every 4"
    words += f" --device {place.device} --thinning L100 --labels as-is"
    calls = {
        name: [*SALTERN, "train-casm", str(shards), "--out", str(place.folder / name), *words.split()]
        for name in ("whole", "cut")
    }
    call(place, calls["whole"])
    kill(place, calls["cut"], (place.folder / "cut/checkpoints/8").exists)
    assert not (place.folder / f"cut/checkpoints/{TRAINED}").exists()
    call(place, [*calls["cut"], "--resume"])
    ends = [(place.folder / name / f"checkpoints/{TRAINED}/tensors.safetensors").read_bytes() for name in calls]
    assert ends[0] == ends[1]
    logs = [(place.folder / name / "log.jsonl").read_text() for name in calls]
    assert logs[0] == logs[1]
    return {"bytes": len(ends[0])}


def casm_waits(place: Place) -> dict[str, Any]:
    """No step of a CASM training waits for the GPU, also with snapshots and past classifiers; its crops are the CPU's.

    The mode is that of the process, and the decoder's thread may wait, so batches are decoded before.
    """
    device, how = torch.device(place.device), Preprocess(place.side, place.side)
    shards = write_shards(place.folder / "casm-feed", place.images, 1, 64)
    index = make_index(expand([str(shards)])[0], 1000)
    name = choose_decoder("auto", place.device)
    fed, on_cpu = (
        Batches(index, 16, make_decoder(how, *words), threads=4)
        for words in ((name, place.device, 4), (choose_decoder("auto", "cpu"),))
    )
    batches = list(fed.run(0, 8))
    off = (batches[0].pixels_BHWC.cpu().float() - on_cpu.read(0).pixels_BHWC.float()).abs()
    assert off.mean() < 3, off.mean()  # levels; nvJPEG repeats colours where libjpeg interpolates them
    network = classifiers.load(place.models[0], "none", side=place.side).model.to(device)
    often = replace(thinning_named("L100"), save_every=2, hp=0.6)
    training = Training(network, Hyperparameters(often, lam="auto", pool_size=3), side=place.side)
    normalise, members = Normalise({"mean": how.mean, "std": how.std}, device), []
    with arithmetic("fp32"):
        try:
            for number, batch in enumerate(batches):
                if number == 2 and not place.small:  # libraries load their kernels in the first steps
                    torch.cuda.set_sync_debug_mode("error")
                log = training.step(normalise(batch.pixels_BHWC), send(batch.label_B, device))
                members.append(log.member)
        finally:
            if not place.small:
                torch.cuda.set_sync_debug_mode("default")
    assert max(members[2:]) >= 0
    return {"decoder": name, "mean difference": float(off.mean()), "steps": len(batches)}


CHECKS = [
    decoding, local_engine, ray_engine, killed_run, rates, casm_waits, casm_resumes, compiled, precisions, maps_repeat,
    maps_exact,
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
