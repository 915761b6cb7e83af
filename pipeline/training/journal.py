"""The log of a training: one line per step in DIR/log.jsonl, its speed, and its progress.

log.jsonl holds only what follows from the seed, so that the log of a resumed training is the same to the bit. Times
are in speed.jsonl.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from saltern.pipeline.engine.progress import clock
from saltern.pipeline.storage.files import write
from saltern.pipeline.training.trainee import Entry, Trainee
from saltern.schemas.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVERY = 20  # steps between two readings of the device, each of which waits for it
SAID_EVERY_S = 10.0


class Journal:
    """The log of one training from a step on; lines of later steps are removed.

    Args:
        total: steps of the whole training.
        batch_size: images of a step, of all ranks.
        say: takes a line for the user.
        trainee: describes lines for the user, and warns of them.
        tensorboard: also write all measurements as scalars to DIR/tensorboard.
    """

    def __init__(
        self,
        root: Path,
        start: int,
        total: int,
        batch_size: int,
        say: Callable[[str], None],
        trainee: Trainee,
        *,
        tensorboard: bool = False,
    ) -> None:
        self._start, self._total, self._batch_size, self._say = start, total, batch_size, say
        kept = _cut(root / "log.jsonl", start)
        if kept < start:
            say(f"{root / 'log.jsonl'} lacks {start - kept} of the {start} steps that were done")
        _cut(root / "speed.jsonl", start)
        self._log, self._speed = ((root / name).open("a") for name in ("log.jsonl", "speed.jsonl"))
        self._scalars = _writer(root / "tensorboard", start) if tensorboard else None
        self._waiting: list[tuple[Entry, Tensor]] = []
        self._trainee = trainee
        self._began = self._read = self._said = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._speed.close()
        if self._scalars is not None:
            self._scalars.close()

    def add(self, entry: Entry, damaged: Tensor) -> None:
        """Add a step and the number of its damaged images; it is written with the next `flush`, or soon."""
        self._waiting.append((entry, damaged))
        if len(self._waiting) >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Write the added steps to disk.

        Raises:
            UserError: a loss was not finite.
        """
        if not self._waiting:
            return
        for entry, damaged in self._waiting:
            line = {**entry.floats(), "damaged": int(damaged)}
            self._log.write(json.dumps(line) + "\n")
            self._show("training", line, entry.step)
            if not all(map(math.isfinite, line.values())):
                self._log.flush()
                raise UserError(
                    f"step {entry.step}: a loss is not finite; train in another folder with {self._trainee.remedy}"
                )
            warning = self._trainee.warn(line)
            if warning is not None:
                self._say(warning)
        now, count, last = time.monotonic(), len(self._waiting), self._waiting[-1][0].step
        rate = count * self._batch_size / max(now - self._read, 1e-9)
        self._speed.write(json.dumps({"step": last, "images_per_s": rate}) + "\n")
        for file in (self._log, self._speed):
            file.flush()
            os.fsync(file.fileno())
        self._waiting, self._read = [], now
        if now - self._said >= SAID_EVERY_S:
            self._said = now
            self._say(self._progress(line, now))

    def add_validation(self, line: Mapping[str, float]) -> None:
        """Add a line of validation.jsonl; the steps before it are written."""
        self._show("validation", line, int(line["step"]) - 1)

    def _show(self, group: str, line: Mapping[str, float], step: int) -> None:
        if self._scalars is not None:
            for name, value in line.items():
                if name != "step":
                    self._scalars.add_scalar(f"{group}/{name}", value, step)

    def _progress(self, line: dict[str, float], now: float) -> str:
        done = int(line["step"]) + 1
        pace = (now - self._began) / (done - self._start)
        return (
            f"step {done:,}/{self._total:,} | {self._batch_size / pace:,.1f} images/s | "
            f"ETA {clock((self._total - done) * pace)} | {self._trainee.describe(line)}"
        )


def _writer(folder: Path, start: int) -> "SummaryWriter":
    """Return a writer of scalars. TensorBoard drops those of an earlier process from the step `start` on."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start)


def _cut(path: Path, start: int) -> int:
    """Keep only the lines of the steps before `start`, and return their number. Raises UserError for other lines."""
    kept: list[str] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] < start:
                kept.append(line)
        except ValueError:
            break  # a killed training left its last line incomplete
        except (TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path} is no log of a training; move it away, or give another --out") from error
    write(path, "".join(f"{line}\n" for line in kept).encode())
    return len(kept)
