"""Progress on stderr: rich's bar on a terminal, plain log lines elsewhere."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from saltern.pipeline.engine.outcome import State
from saltern.schemas.errors import printable
from saltern.schemas.text import counted

PLAIN_EVERY_S = 10.0
WAITING_S = 30.0


def shares(seconds: Mapping[str, float]) -> str:
    """Return the share of each phase, as `read 3 %, decode 40 %, ...`."""
    whole = sum(seconds.values()) or 1.0
    return ", ".join(f"{phase} {100 * spent / whole:.0f} %" for phase, spent in seconds.items())


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """The progress display, which the driver calls as its `tick`.

    Args:
        shards_done, shards: those done before this drive, and all.
        expected: estimated images of the pending shards; None if unknown.
        console: of the bar; by default stderr. The bar is shown only on a terminal.
    """

    def __init__(self, shards_done: int, shards: int, expected: int | None, console: Console | None = None):
        self._done, self._shards, self._expected = shards_done, shards, expected
        self._started = self._last = self._moved = time.monotonic()
        self._most = 0  # images; the largest number so far
        console = console or Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = TextColumn("{task.percentage:>3.0f} %"), BarColumn(None), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=console, expand=True, transient=True, refresh_per_second=4)
            self._task = self._bar.add_task("", total=None)
        self._workers = 0
        self._waiting = True

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        text = printable(text)
        if self._bar:
            self._bar.console.print(Text(text))
        else:
            print(text, file=sys.stderr, flush=True)

    def __call__(self, state: State) -> None:
        now = time.monotonic()
        if not self._workers and state.workers:
            self._started = now  # loading the model is no part of the rate
        if state.workers != self._workers:
            self._workers = state.workers
            if state.wanted > 1:
                self.say(f"{state.workers} of {state.wanted} workers ready")
        if self._waiting and (state.workers or now - self._started > WAITING_S):
            self._waiting = False
            if not state.workers:
                self.say("no worker is ready yet: the model is loading, or a cluster has no free resources")
        if state.images > self._most:
            self._most, self._moved = state.images, now
        while state.notes:
            self.say(state.notes.pop(0))
        if self._bar:
            expected = self._images(state)
            total = max(expected, state.images) if expected else None
            self._bar.update(self._task, completed=state.images, total=total, description=self._short(state))
        elif now - self._last >= PLAIN_EVERY_S:
            self._last = now
            self.say(self.line(state))

    def _images(self, state: State) -> int | None:
        """Return the images of all shards of this drive, estimated; None if unknown."""
        if self._expected is None and state.outcome.receipts:
            return round(state.outcome.samples / len(state.outcome.receipts) * state.total)
        return self._expected

    def _eta(self, state: State) -> str:
        """Return the remaining time, or nothing if it is unknown.

        The rate is taken when images were last finished, so that the time falls evenly between two batches.
        """
        expected = self._images(state)
        if not expected or not self._most or not state.workers:
            return ""
        left = max(0, expected - self._most) * (self._moved - self._started) / self._most
        return f"ETA {clock(max(0.0, left - (time.monotonic() - self._moved)))}"

    def _short(self, state: State) -> str:
        """Return the text after the bar; it leaves room for the bar in 80 columns."""
        failures = [f"{state.outcome.failed_rows} not ok"] * bool(state.outcome.failed_rows)
        failures += [f"{len(state.outcome.failures)} failed"] * bool(state.outcome.failures)
        return "  ".join(
            filter(None, (self._shards_done(state), self._rate(state, "img/s"), self._eta(state), *failures))
        )

    def line(self, state: State) -> str:
        """Return the plain line of the log."""
        outcome = state.outcome
        images = counted(state.images, "image")
        failures = f"{counted(outcome.failed_rows, 'row')} not ok, {counted(len(outcome.failures), 'shard')} failed"
        spent = shares(outcome.seconds) if outcome.receipts else ""
        parts = (self._shards_done(state), images, self._rate(state, "images/s"), self._eta(state), failures, spent)
        return " | ".join(filter(None, parts))

    def _shards_done(self, state: State) -> str:
        return f"{self._done + len(state.outcome.receipts)}/{self._shards} shards"

    def _rate(self, state: State, unit: str) -> str:
        rate = state.images / max(time.monotonic() - self._started, 1e-9)
        return f"{rate:,.0f} {unit}" if rate >= 100 else f"{rate:.1f} {unit}"
