"""What every request for a training has, and the checks that all of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from saltern.pipeline.masknet.checkpoint import Checkpoint
from saltern.pipeline.naming import install_hint
from saltern.pipeline.training.trainee import Plan
from saltern.schemas.errors import UserError

_WIDE = 150  # characters of a value in an error
_FREE = ("workers", "torch_threads")  # may differ in a resumed training; only the last bits of its results then do
_COUNTS = ("epochs", "steps_per_epoch", "batch_size", "side", "checkpoint_every", "decode_threads", "workers")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that every training has; None: the default."""

    out: str
    epochs: int
    steps_per_epoch: int | None = None
    batch_size: int  # of all workers together
    side: int | None = None  # of the network's input, pixels
    min_crop: float  # least share of the image that a random crop covers
    checkpoint_every: int | None = None  # steps; None: an epoch
    decode_threads: int | None = None  # of a worker
    device: str = "auto"
    workers: int = 1
    gpus_per_worker: float | None = None
    address: str | None = None  # of a Ray cluster; None: $RAY_ADDRESS, or no cluster
    resume: bool = False
    tensorboard: bool = False


R = TypeVar("R", bound=Request)
R_contra = TypeVar("R_contra", bound=Request, contravariant=True)


class MakePlan(Protocol[R_contra]):
    """Check a request and fill in every default: takes the device, the checkpoint to resume from, and `say`."""

    def __call__(
        self, request: R_contra, device: str, existing: Checkpoint | None, say: Callable[[str], None]
    ) -> Plan: ...


def check_request(request: Request) -> None:
    """Raise UserError if a number is out of range, workers cannot share a batch, or TensorBoard is not installed."""
    for name in _COUNTS:
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    if request.batch_size % request.workers:
        raise UserError(
            f"--batch-size {request.batch_size} is of all workers, and {request.workers} cannot share it equally"
        )
    if request.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(f"--tensorboard needs the package tensorboard: {install_hint('tensorboard')}") from error
    if not 0 < request.min_crop <= 1:
        raise UserError(f"--min-crop {request.min_crop}: it is a share of the image, more than 0 and at most 1")


def resumed_config(
    existing: Checkpoint, config: dict[str, Any], root: Path, say: Callable[[str], None], **absent: Any
) -> dict[str, Any]:
    """Return the requested config with the torch threads of the existing training.

    Args:
        absent: the values of keys that older checkpoints lack.

    Raises:
        UserError: the two differ in more than `_FREE`.
    """
    held = {**absent, **existing.config}
    old, new = ({**each, **each["settings"], "settings": None} for each in (held, config))
    if differing := differences(old, new):
        raise UserError(
            f"{root} holds a training under another config: {differing}. Resume with the old options, or give another "
            "--out"
        )
    if old["workers"] != new["workers"]:
        say(f"{old['workers']} workers before, {new['workers']} now: results differ in the last bits from here on")
        return config
    return {**config, "torch_threads": old["torch_threads"]}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the keys, except `_FREE`, whose values differ between two configs; "" if none does."""
    return "; ".join(
        f"{key}: {repr(old.get(key))[:_WIDE]} there, {repr(new.get(key))[:_WIDE]} requested"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key not in _FREE
    )
