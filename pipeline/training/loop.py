"""The training loop of each rank: check, resume from the newest checkpoint, then step by step.

Shape suffixes: B batch, C H W the network's input.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saltern.pipeline.device import arithmetic, faults
from saltern.pipeline.machine import decode_threads
from saltern.pipeline.masknet.checkpoint import Checkpoints
from saltern.pipeline.shards.decoder import make_decoder
from saltern.pipeline.shards.resample import send
from saltern.pipeline.training.batches import Batches, own
from saltern.pipeline.training.journal import Journal
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.trainee import Plan, Repeat, Say
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import DeviceLostError, ShardError, UserError

_WRITER_WAIT_S = 60  # for the rank 0 of a dead driver, until its cluster has ended it


def run(plan: Plan, ranks: Ranks, say: Say) -> Path:
    """Do the remaining steps of a training, as one of its ranks, and return the last checkpoint.

    Only rank 0 writes. The others must see the same folder, as all ranks read the checkpoint.

    Raises:
        UserError: a pool file was altered, there is too little memory, ranks disagree, or a loss is not finite.
        DeviceLostError: this process cannot go on; the message names the complete checkpoint.
        KeyboardInterrupt: the message names the complete checkpoint.
    """
    say = say if ranks.rank == 0 else lambda text: None
    setbacks = 0
    with contextlib.ExitStack() as held:
        held.enter_context(
            arithmetic(
                plan.config["settings"]["precision"],
                threads=plan.config["torch_threads"],
                what=f"training on {plan.config['model']}",
                fix="train on another classifier",
            )
        )
        if ranks.rank == 0:
            held.enter_context(locked(plan.root, "writer", _WRITER_WAIT_S))
        while True:
            loop = _Loop(plan, ranks, say, setbacks)
            try:
                return loop.run()
            except Repeat as error:
                setbacks = loop.setbacks + 1
                say(plan.recover(error, setbacks))
                del loop  # before the next one takes memory


class _Loop:
    def __init__(self, plan: Plan, ranks: Ranks, say: Say, setbacks: int) -> None:
        self._plan, self._ranks, self._say = plan, ranks, say
        self._trainee = plan.start(ranks, say)
        self._checkpoints = Checkpoints(plan.root)
        newest = self._checkpoints.newest(say)
        if newest is not None:
            self._trainee.load_state_dict(newest.state())
            self._checkpoints.known(self._trainee.members)
            say(f"resumes at step {newest.step:,} of {plan.config['steps']:,}")
        self._trainee.setbacks = max(setbacks, self._trainee.setbacks)
        self._start = self._trainee.steps_done
        ranks.agree("the step to resume at", self._start, newest.digest if newest else None)
        self._last = plan.root / "checkpoints" / str(self._start)
        self._trainee.begin()

    @property
    def setbacks(self) -> int:
        """Repetitions so far."""
        return self._trainee.setbacks

    def run(self) -> Path:
        """Do the steps, and return the last checkpoint. Raises Repeat."""
        plan, trainee, say = self._plan, self._trainee, self._say
        steps, batch_size = plan.config["steps"], plan.config["batch_size"]
        batches = batches_of(plan, self._ranks)
        writes = self._ranks.rank == 0
        try:
            with (
                faults(),
                contextlib.closing(batches.run(self._start, steps)) as stream,
                Journal(plan.root, self._start, steps, batch_size, say, trainee, tensorboard=plan.tensorboard)
                if writes
                else _Silent() as journal,
            ):
                for batch in stream:
                    entry = trainee.step(batch)
                    journal.add(entry, total(self._ranks, batch.damaged))
                    trainee.observe(entry)
                    self._validate_and_save(trainee.steps_done, journal)
        except KeyboardInterrupt:
            say(f"interrupted at step {trainee.steps_done:,}; {describe_checkpoint(self._last)}")
            raise
        except (ShardError, MemoryError) as error:
            raise UserError(f"{error}; {describe_checkpoint(self._last)}") from error
        except DeviceLostError as error:
            raise DeviceLostError(f"{error}; {describe_checkpoint(self._last)}") from error
        if writes:
            trainee.finish()
        return self._last

    def _validate_and_save(self, step: int, journal: "Journal | _Silent") -> None:
        """Validate and save, if due after a step. Log and validation are written before the step's checkpoint."""
        config = self._plan.config
        validates = step % self._plan.steps_per_epoch == 0
        saves = step % config["checkpoint_every"] == 0 or step == config["steps"]
        if not (validates or saves):
            return
        journal.flush()
        healthy = self._trainee.settle()
        line = self._trainee.validate() if validates else None
        if line is not None:
            journal.add_validation(line)
        if saves and (healthy or step == config["steps"]):
            self._save()

    def _save(self) -> None:
        trainee = self._trainee
        what, digest = trainee.agreement()
        self._ranks.agree(what, trainee.steps_done, digest)
        if self._ranks.rank == 0:
            self._last = self._checkpoints.save(trainee.state_dict(), self._plan.config, trainee.members)


class _Silent:
    """A journal that writes nothing, for all ranks but 0."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None: ...

    def add(self, entry: object, damaged: Tensor) -> None: ...

    def flush(self) -> None: ...

    def add_validation(self, line: object) -> None: ...


def total(ranks: Ranks, count: int) -> Tensor:
    """Return the sum over the ranks, on the device."""
    summed = torch.full((), float(count), device=ranks.device)  # torch.tensor would wait for the device
    ranks.average([summed])
    return summed * ranks.world


@contextlib.contextmanager
def locked(root: Path, name: str, wait_s: float = 0) -> Iterator[None]:
    """Lock a training's folder: two trainings in it would each remove the other's files.

    Raises:
        UserError: the folder takes no files, or another training holds the lock for `wait_s` seconds.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f"lock-{name}").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error}") from error
    end = time.monotonic() + wait_s
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= end:
                    raise UserError(
                        f"another training is running in {root}; wait for it, or give another --out"
                    ) from error
            time.sleep(0.5)
        yield


def describe_checkpoint(last: Path) -> str:
    """Say whether there is a checkpoint to resume from."""
    if not last.is_dir():
        return "no checkpoint is complete yet"
    return f"the checkpoint of step {int(last.name):,} is complete: the same command with --resume continues from it"


def batches_of(plan: Plan, ranks: Ranks) -> Batches:
    """Return the batches of a rank. Raises UserError if the training's decoder is not installed here."""
    config, threads = plan.config, plan.threads or decode_threads()
    decoder = make_decoder(preprocess_of(config), config["decoder"], str(ranks.device), threads)
    return Batches(
        plan.index, config["batch_size"], decoder, config["min_crop"],
        config["settings"]["seed"], threads, ranks.rank, ranks.world,
    )  # fmt: skip


def preprocess_of(config: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing in the config of a checkpoint; those of 0.1 have no squash."""
    return Preprocess(
        resize=config["resize"],
        crop=config["side"],
        squash=config.get("squash", False),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


class Normalise:
    """Moves pixels to the device and normalises them."""

    def __init__(self, config: Mapping[str, Any], device: torch.device) -> None:
        self._mean, self._std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Return x_BCHW, float32, in the order of channels_last."""
        own(pixels_BHWC)
        pixels_BHWC = pixels_BHWC if pixels_BHWC.is_cuda else send(pixels_BHWC, self._mean.device)
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float()
        return x_BCHW.div_(255).sub_(self._mean).div_(self._std)
