"""Progress on stderr: one live line on a terminal, plain log lines elsewhere."""

import sys
import time
from collections.abc import Iterable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from saltern.pipeline.engine.driver import State
from saltern.schemas.receipt import PHASES, Receipt

PLAIN_EVERY_S = 10.0
WAITING_S = 30.0


def spent(receipts: Iterable[Receipt]) -> str:
    """Return the share of thread time in each phase, as `read 3 %, decode 40 %, ...`."""
    total = dict.fromkeys(PHASES, 0.0)
    for receipt in receipts:
        for phase in PHASES:
            total[phase] += receipt.seconds[phase]
    whole = sum(total.values()) or 1.0
    return ", ".join(f"{phase} {100 * seconds / whole:.0f} %" for phase, seconds in total.items())


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
    """

    def __init__(self, shards_done: int, shards: int, expected: int | None):
        self._done, self._shards, self._expected = shards_done, shards, expected
        self._started = self._last = time.monotonic()
        console = Console(stderr=True)
        self._live = Live(console=console, refresh_per_second=4, transient=True) if sys.stderr.isatty() else None
        self._workers = 0
        self._waiting = True

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the live line."""
        if self._live:
            self._live.console.print(Text(text))
        else:
            print(text, file=sys.stderr, flush=True)

    def __call__(self, state: State) -> None:
        if state.workers != self._workers and state.wanted > 1:
            self._workers = state.workers
            self.say(f"{state.workers} of {state.wanted} workers ready")
        if self._waiting and (state.workers or time.monotonic() - self._started > WAITING_S):
            self._waiting = False
            if not state.workers:
                self.say(f"no worker of {state.wanted} is ready yet; waiting for the cluster's resources")
        while state.notes:
            self.say(state.notes.pop(0))
        if self._live:
            self._live.update(Text(self.line(state)))
        elif time.monotonic() - self._last >= PLAIN_EVERY_S:
            self._last = time.monotonic()
            self.say(self.line(state))

    def line(self, state: State) -> str:
        outcome = state.outcome
        seconds = time.monotonic() - self._started
        rate = state.images / seconds if seconds else 0.0
        parts = [
            f"{self._done + len(outcome.receipts) + outcome.elsewhere}/{self._shards} shards",
            f"{state.images:,} images",
            f"{rate:,.1f} images/s",
        ]
        if self._expected and rate:
            parts.append(f"ETA {clock(max(0.0, self._expected - state.images) / rate)}")
        bad = sum(receipt.failed for receipt in outcome.receipts.values())
        parts.append(f"{bad} rows not ok, {len(outcome.failures)} shards failed")
        if outcome.receipts:
            parts.append(spent(outcome.receipts.values()))
        return " | ".join(parts)
