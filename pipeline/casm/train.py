"""The training of CASM in one process: checked first, then step by step, with a resume that is exact.

Shape suffixes: B batch, C H W the network's input.
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import classifiers
from pipeline.casm.checkpoint import Checkpoint, Checkpoints
from pipeline.casm.data import Batches
from pipeline.casm.head import restrict
from pipeline.casm.index import make_index
from pipeline.casm.journal import Journal
from pipeline.casm.settings import Settings
from pipeline.casm.step import Training
from pipeline.expand import expand
from pipeline.prepare import cores, pick_device, see_own_modules
from schemas.errors import ShardError, UserError

SHARE = 5  # an epoch is a fifth of the data, as published
_THREADS = "torch_threads"  # as the run began, so that sums keep their order
_GB = 1e9


@dataclass(frozen=True)
class Request:
    """What the user asked for; None where a default decides."""

    shards: Sequence[str]
    out: str
    model: str
    settings: Settings  # its steps follow from the epochs
    weights: str = "DEFAULT"
    classes: Sequence[int] | None = None  # in play; None: all
    epochs: int = 60
    steps_per_epoch: int | None = None
    batch_size: int = 128
    side: int | None = None  # of the network's input
    checkpoint_every: int | None = None  # steps; None: an epoch
    decode_threads: int | None = None
    device: str = "auto"
    resume: bool = False


def say_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train(request: Request, say: Callable[[str], None] = say_aside) -> Path:
    """Train, or go on with a training, and return its last checkpoint.

    The same request, stopped anywhere and resumed, ends with the same weights, pool files and log to the bit: on the
    same kind of device, with the same number of torch threads (kept in the checkpoint).

    Raises:
        UserError: anything that was asked for cannot be had, before any work; or a loss that is not finite.
        KeyboardInterrupt: once it is said what stands.
    """
    device = torch.device(pick_device(request.device))
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or matrix products would not repeat
    root = Path(request.out)
    checkpoints = Checkpoints(root)
    standing = _standing(checkpoints, request, say)
    with _exact(standing):
        training, batches, config = _prepare(request, device, say)
        if standing is not None:
            _same(standing, config, root)
        _state_memory(training, say)
        if standing is not None:
            training.load_state_dict(standing.state())
            checkpoints.known(training.pool.members)
            say(f"goes on from step {standing.step:,} of {config['steps']:,}")
        with _locked(root):
            return _go(training, batches, config, checkpoints, say)


def _standing(checkpoints: Checkpoints, request: Request, say: Callable[[str], None]) -> Checkpoint | None:
    found = checkpoints.newest(say)
    if found is not None and not request.resume:
        raise UserError(
            f"{request.out} holds a training, at step {found.step}: --resume goes on, or give another --out"
        )
    if found is None and request.resume:
        say(f"{request.out} holds no checkpoint yet; begins at step 0")
    return found


def _prepare(
    request: Request, device: torch.device, say: Callable[[str], None]
) -> tuple[Training, Batches, dict[str, Any]]:
    """All that can be wrong is found here."""
    _check(request)
    see_own_modules()
    shards, hints = expand(request.shards)
    for hint in hints:
        say(hint)
    classifier = classifiers.load(request.model, request.weights, seed=request.settings.seed)
    if request.classes is not None:
        restrict(classifier.model, request.classes)
    index = make_index(shards, classifier.classes, request.classes)
    each = request.steps_per_epoch or -(-len(index) // (SHARE * request.batch_size))
    settings = replace(request.settings, steps=request.epochs * each)
    config = {
        **_config(request, classifier, settings),
        "checkpoint_every": request.checkpoint_every or each,
        "samples": len(index),
        "shards": [[shard.name, shard.size] for shard in shards],
        "device": device.type,
        _THREADS: torch.get_num_threads(),
    }
    threads = request.decode_threads or min(cores(), 16)
    batches = Batches(
        index, request.batch_size, config["side"], config["interpolation"], settings.seed, threads=threads
    )
    return Training(classifier.model.to(device), settings), batches, config


def _config(request: Request, classifier: classifiers.Classifier, settings: Settings) -> dict[str, Any]:
    """What a resume must be asked for again, and what whoever uses the masks has to know; JSON."""
    usual = classifier.preprocess
    return {
        "model": request.model,
        "weights_digest": classifier.digest,
        "model_classes": classifier.classes,
        "classes": None if request.classes is None else list(request.classes),
        "settings": {**asdict(settings), "thinning": settings.thinning.name},
        "steps": settings.steps,
        "batch_size": request.batch_size,
        "side": request.side or usual.crop,
        "interpolation": usual.interpolation,
        "mean": list(usual.mean),
        "std": list(usual.std),
    }


def _check(request: Request) -> None:
    for name in ("epochs", "steps_per_epoch", "batch_size", "side", "checkpoint_every", "decode_threads"):
        given = getattr(request, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} {given}: it must be 1 or more")


def _same(standing: Checkpoint, config: dict[str, Any], root: Path) -> None:
    there, asked = ({**held, **held["settings"], "settings": None} for held in (standing.config, config))
    differing = [
        f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked for"
        for key in {**there, **asked}
        if there.get(key) != asked.get(key)
    ]
    shown = [text if len(text) <= 300 else f"{text[:300]}..." for text in differing]
    if differing:
        raise UserError(
            f"{root} holds a training under another config: {'; '.join(shown)}. Go on with the old settings, or give "
            "another --out"
        )


def _state_memory(training: Training, say: Callable[[str], None]) -> None:
    """Say what the full pool takes of this machine's memory. Raises UserError where it can't fit."""
    settings = training.settings
    members = min(settings.pool_size, settings.thinning.taken(settings.steps or 0))
    if not members:
        return
    one = training.pool.needs(training.classifier) // settings.pool_size
    free = available_memory()
    stated = f"the pool takes up to {members * one / _GB:,.2f} GB of memory ({members} classifiers)"
    say(stated if free is None else f"{stated}; {free / _GB:,.1f} GB are free")
    if free is not None and members * one > free:
        raise UserError(
            f"{stated}, and {free / _GB:,.2f} GB are free; lower --pool-size (to {free // one} at most), or keep "
            "weights in 16 bits: --pool-half"
        )


def available_memory() -> int | None:
    """Bytes that this process may still take, by the machine and its control group; None where neither says."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(found)) if found else None


@contextlib.contextmanager
def _exact(standing: Checkpoint | None) -> Iterator[None]:
    """What repeats to the bit, where there is a choice; the settings are put back on the way out."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    tuned, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.backends.cudnn.benchmark = False
    if standing is not None:
        torch.set_num_threads(standing.config[_THREADS])
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = tuned
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Two trainings in one folder would each remove what the other writes."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another training is at work in {root}; wait for it, or give another --out") from error
        yield


def _go(
    training: Training, batches: Batches, config: dict[str, Any], checkpoints: Checkpoints, say: Callable[[str], None]
) -> Path:
    start, steps = training.steps_done, config["steps"]
    last = checkpoints.root / "checkpoints" / str(start)
    journal = Journal(checkpoints.root, start, steps, batches.batch_size, say)
    mean, std = (torch.tensor(config[key], device=training.device).view(3, 1, 1) for key in ("mean", "std"))
    try:
        with contextlib.closing(batches.run(start, steps)) as stream:
            for batch in stream:
                x_BCHW = _normalised(batch.pixels_BHWC, mean, std)
                log = training.step(x_BCHW, batch.label_B.to(training.device, non_blocking=True))
                journal.add(log, batch.damaged)
                if training.steps_done % config["checkpoint_every"] == 0 or training.steps_done == steps:
                    journal.flush()
                    last = checkpoints.save(training.state_dict(pool=False), config, training.pool.members)
    except KeyboardInterrupt:
        say(f"interrupted at step {training.steps_done:,}; {_stands(last)}")
        raise
    except ShardError as error:
        raise UserError(f"{error}; {_stands(last)}") from error
    finally:
        journal.close()
    return last


def _stands(last: Path) -> str:
    if not last.is_dir():
        return "no checkpoint stands yet"
    return f"the checkpoint of step {int(last.name):,} stands: the same command with --resume goes on from there"


def _normalised(pixels_BHWC: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    pixels_BHWC = pixels_BHWC.pin_memory() if mean.is_cuda else pixels_BHWC
    x_BCHW = pixels_BHWC.to(mean.device, non_blocking=True).permute(0, 3, 1, 2).float().contiguous()
    return x_BCHW.div_(255).sub_(mean).div_(std)
