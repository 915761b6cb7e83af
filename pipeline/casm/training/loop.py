"""The training loop of each rank: check, resume from the newest checkpoint, then step by step.

Shape suffixes: B batch, C H W the network's input.
"""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from saltern.pipeline.casm.algorithm.collapse import DEAD, SETBACKS, SLOWER, Collapse, Watch
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.training.journal import Journal
from saltern.pipeline.casm.training.plan import TrainingPlan, preprocess_of
from saltern.pipeline.casm.watch import curves
from saltern.pipeline.casm.watch.validation import Validation
from saltern.pipeline.device import arithmetic, faults
from saltern.pipeline.machine import available_memory, decode_threads
from saltern.pipeline.masknet.checkpoint import Checkpoints
from saltern.pipeline.masknet.head import restrict
from saltern.pipeline.models import classifiers
from saltern.pipeline.shards.decoder import make_decoder
from saltern.pipeline.shards.resample import send
from saltern.pipeline.training.batches import Batches, own
from saltern.pipeline.training.ranks import Ranks
from saltern.schemas.errors import CollapseError, DeviceLostError, ShardError, UserError

_GB = 1e9
_WRITER_WAIT_S = 60  # for the rank 0 of a dead driver, until its cluster has ended it


def run(plan: TrainingPlan, ranks: Ranks, say: Callable[[str], None]) -> Path:
    """Do the remaining steps of a training, as one of its ranks, and return the last checkpoint.

    Only rank 0 writes. The others must see the same folder, as all ranks read the checkpoint.

    Raises:
        UserError: a pool file was altered, there is too little memory, ranks disagree, or a loss is not finite.
        KeyboardInterrupt: the message names the complete checkpoint.
    """
    say = say if ranks.rank == 0 else lambda text: None
    setbacks = 0
    with contextlib.ExitStack() as held:
        held.enter_context(
            arithmetic(
                plan.hyperparameters.precision,
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
            except Collapse as collapse:
                setbacks = loop.setbacks + 1
                say(_setback(collapse, plan, setbacks))
                del loop  # before the next one takes memory


def _setback(collapse: Collapse, plan: TrainingPlan, setbacks: int) -> str:
    """Describe a collapse from which the training recovers. Raises CollapseError if there were too many before it."""
    hyperparameters = plan.hyperparameters
    found = f"masks collapsed: they have taken out {collapse.what} for {DEAD} steps, up to step {collapse.step:,}"
    if setbacks <= SETBACKS:
        factor = SLOWER**setbacks
        return f"warning: {found}; back to the last healthy checkpoint, with {factor:g} x --lr-mask"
    fix = f"lower --lr-mask ({hyperparameters.lr_mask:g}) or --tv ({hyperparameters.tv:g}), or raise --batch-size"
    if hyperparameters.lam != "auto":
        way = "lower" if collapse.what == "nothing" else "raise"
        fix = f"{way} --lambda ({hyperparameters.start_lambda():g}), or use --lambda auto with --preset steady"
    raise CollapseError(
        f"{found}, again after {SETBACKS} repetitions with a smaller step; {fix}, and give another --out"
    )


class _Loop:
    def __init__(self, plan: TrainingPlan, ranks: Ranks, say: Callable[[str], None], setbacks: int) -> None:
        self._plan, self._ranks, self._say = plan, ranks, say
        self._training = build(plan, ranks)
        _check_memory(self._training, ranks.on_machine, say)
        self._checkpoints = Checkpoints(plan.root)
        newest = self._checkpoints.newest(say)
        if newest is not None:
            self._training.load_state_dict(newest.state())
            self._checkpoints.known(self._training.pool.members)
            say(f"resumes at step {newest.step:,} of {plan.config['steps']:,}")
        self._training.setbacks = max(setbacks, self._training.setbacks)
        self._watch = Watch()
        self._start = self._training.steps_done
        ranks.agree("the step to resume at", self._start, newest.digest if newest else None)
        self._last = plan.root / "checkpoints" / str(self._start)
        self._validation = self._validated() if plan.val else None

    @property
    def setbacks(self) -> int:
        """Collapses so far."""
        return self._training.setbacks

    def run(self) -> Path:
        """Do the steps, and return the last checkpoint. Raises Collapse."""
        plan, training = self._plan, self._training
        steps, batch_size = plan.config["steps"], plan.config["batch_size"]
        batches, normalise = batches_of(plan, self._ranks), Normalise(plan, training.device)
        writes = self._ranks.rank == 0
        classes = len(plan.config["classes"] or range(plan.config["model_classes"]))
        try:
            with (
                faults(),
                contextlib.closing(batches.run(self._start, steps)) as stream,
                Journal(plan.root, self._start, steps, batch_size, self._say, classes, tensorboard=plan.tensorboard)
                if writes
                else _Silent() as journal,
            ):
                for batch in stream:
                    log = training.step(normalise(batch.pixels_BHWC), send(batch.label_B, training.device))
                    journal.add(log, self._total(batch.damaged))
                    self._watch.add(log.step, log.area())
                    self._validate_and_save(training.steps_done, journal)
        except KeyboardInterrupt:
            self._say(f"interrupted at step {training.steps_done:,}; {describe_checkpoint(self._last)}")
            raise
        except (ShardError, DeviceLostError, MemoryError) as error:
            raise UserError(f"{error}; {describe_checkpoint(self._last)}") from error
        if writes:
            curves.draw(plan.root)
        return self._last

    def _validated(self) -> Validation:
        config, ranks = self._plan.config, self._ranks
        validation = Validation(
            self._plan.val, self._plan.root, preprocess_of(config), config["classes"] or range(config["model_classes"]),
            max(1, config["batch_size"] // ranks.world), self._plan.threads or decode_threads(),
            ranks.rank, ranks.world, ranks.average, self._say, self._plan.val_labels,
        )  # fmt: skip
        validation.cut(self._start)
        return validation

    def _validate_and_save(self, step: int, journal: "Journal | _Silent") -> None:
        """Validate and save, if due after a step. Log and validation are written before the step's checkpoint."""
        validates = self._validation is not None and step % self._plan.steps_per_epoch == 0
        saves = step % self._plan.config["checkpoint_every"] == 0 or step == self._plan.config["steps"]
        if validates or saves:
            journal.flush()
            self._watch.read(step - 1)
        if validates and self._validation is not None:
            journal.add_validation(self._validation(self._training))
        if saves and (self._watch.healthy or step == self._plan.config["steps"]):
            self._save()

    def _save(self) -> None:
        training = self._training
        self._ranks.agree("the pool", training.steps_done, training.pool.digest())
        if self._ranks.rank == 0:
            state = training.state_dict(pool=False)
            self._last = self._checkpoints.save(state, self._plan.config, training.pool.members)

    def _total(self, count: int) -> Tensor:
        """Return the sum over the ranks, on the device."""
        total = torch.full((), float(count), device=self._training.device)  # torch.tensor would wait for the device
        self._ranks.average([total])
        return total * self._ranks.world


class _Silent:
    """A journal that writes nothing, for all ranks but 0."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None: ...

    def add(self, log: object, damaged: Tensor) -> None: ...

    def flush(self) -> None: ...

    def add_validation(self, line: object) -> None: ...


def build(plan: TrainingPlan, ranks: Ranks) -> Training:
    """Return the state of a training at its start. Raises UserError if the weights differ from the plan's."""
    config, hyperparameters = plan.config, plan.hyperparameters
    classifier = classifiers.load(config["model"], plan.weights, seed=hyperparameters.seed, side=config["side"])
    if classifier.digest != config["weights_digest"]:
        raise UserError(f"the weights {plan.weights} of rank {ranks.rank} differ from those of the driver")
    model = classifier.model
    if config["classes"] is not None:
        restrict(model, config["classes"], config["side"])
    # Statistics over the whole batch, as one device computes them. torch has SyncBatchNorm only for CUDA.
    synchronised = ranks.world > 1 and ranks.device.type == "cuda" and hyperparameters.batch_norm == "train"
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    # Convolutions are faster in channels_last: depthwise ones take half the time on CPUs.
    model = model.to(ranks.device).to(memory_format=torch.channels_last)
    training = Training(model, hyperparameters, rank=ranks.rank, average=ranks.average, side=config["side"])
    if synchronised:
        # In place: the modules are replaced, their weights are kept.
        nn.SyncBatchNorm.convert_sync_batchnorm(training.decoder)  # type: ignore[no-untyped-call]
    return training


def _check_memory(training: Training, ranks_here: int, say: Callable[[str], None]) -> None:
    """Say how much memory the full pools of this machine's ranks take. Raises UserError if it does not fit."""
    hyperparameters = training.hyperparameters
    members = min(hyperparameters.pool_size, hyperparameters.thinning.taken(hyperparameters.steps or 0))
    if not members:
        return
    one = ranks_here * training.pool.needs(training.classifier) // hyperparameters.pool_size
    free = available_memory()
    stated = f"the pool takes up to {members * one / _GB:,.2f} GB of memory ({members} classifiers" + (
        f", in each of {ranks_here} workers here)" if ranks_here > 1 else ")"
    )
    say(stated if free is None else f"{stated}; {free / _GB:,.1f} GB are free")
    if free is not None and members * one > free:
        raise UserError(
            f"{stated}, and {free / _GB:,.2f} GB are free; lower --pool-size (to {free // one} at most), or keep "
            "weights in 16 bits: --pool-half"
        )


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


def batches_of(plan: TrainingPlan, ranks: Ranks) -> Batches:
    """Return the batches of a rank. Raises UserError if the training's decoder is not installed here."""
    config, threads = plan.config, plan.threads or decode_threads()
    decoder = make_decoder(preprocess_of(config), config["decoder"], str(ranks.device), threads)
    return Batches(
        plan.index, config["batch_size"], decoder, config["min_crop"],
        plan.hyperparameters.seed, threads, ranks.rank, ranks.world,
    )  # fmt: skip


class Normalise:
    """Moves pixels to the device and normalises them."""

    def __init__(self, plan: TrainingPlan, device: torch.device) -> None:
        self._mean, self._std = (torch.tensor(plan.config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Return x_BCHW, float32, in the order of channels_last."""
        own(pixels_BHWC)
        pixels_BHWC = pixels_BHWC if pixels_BHWC.is_cuda else send(pixels_BHWC, self._mean.device)
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float()
        return x_BCHW.div_(255).sub_(self._mean).div_(self._std)
