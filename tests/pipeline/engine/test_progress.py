"""The progress display: one bar of 80 columns on a terminal, plain lines elsewhere, cheap with many receipts."""

import io
import re
import time

import pytest
import toys
from rich.console import Console
from scripted import shards

from saltern.pipeline.engine import progress
from saltern.pipeline.engine.outcome import Outcome, State
from saltern.pipeline.engine.progress import Progress
from saltern.schemas.receipt import Failure

SHARDS = 100_000


@pytest.fixture(scope="module")
def large() -> State:
    """Return a state with 100,000 receipts."""
    outcome = Outcome()
    for shard in shards(*["ok"] * SHARDS):
        outcome.add(toys.receipt(shard))
    return State(outcome, SHARDS, workers=16, wanted=16, images=outcome.samples)


def bar(state: State, expected: int | None) -> str:
    """Return what the terminal shows of the bar, without control sequences."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=20)
    with Progress(0, SHARDS, expected, console) as shown:
        shown(state)
        shown._started -= 100  # a rate of 2,000 images/s
        shown(state)
        assert shown._bar is not None
        shown._bar.refresh()
        time.sleep(0.05)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_the_bar_has_percent_shards_rate_and_eta_in_one_line_of_80_columns(large: State) -> None:
    large.outcome.failed_rows = 99_999
    large.outcome.failures["x"] = Failure("x", "data", "cut", 1)
    said = bar(large, 4 * SHARDS)
    large.outcome.failed_rows, large.outcome.failures = 0, {}
    lines = [line.rstrip() for line in re.split(r"[\r\n]", said) if "%" in line]
    assert lines
    for line in lines:
        assert len(line) <= 80
    last = lines[-1]
    assert "…" not in last
    assert re.match(r" *50 % ━", last)
    for part in (f"{SHARDS}/{SHARDS} shards", "img/s", "ETA", "99999 not ok", "1 failed"):
        assert part in last


def test_the_bar_moves_without_an_estimate(large: State) -> None:
    assert "100 %" in bar(large, None)  # samples of the receipts so far, over all shards


def test_a_tick_costs_under_a_millisecond_with_100_000_receipts(large: State) -> None:
    shown = Progress(0, SHARDS, 2 * SHARDS)
    shown(large)
    since = time.process_time()
    for _ in range(100):
        shown.line(large)
    assert (time.process_time() - since) / 100 < 0.001


def test_the_eta_falls_evenly_between_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress(0, 10, 1280)
    state = State(Outcome(), 10, workers=1, wanted=1)
    shown(state)  # the first worker is ready
    left = []
    for now[0] in (128.0, 160.0, 200.0, 255.0, 256.0):
        state.images = 128 * (int(now[0]) // 128)
        shown(state)
        minutes, seconds = re.search(r"ETA (?:0:)?(\d+):(\d+)", shown.line(state)).groups()  # type: ignore[union-attr]
        left.append(60 * int(minutes) + int(seconds))
    assert left == [1152, 1120, 1080, 1025, 1024]


def test_a_file_gets_plain_lines(
    large: State, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    with Progress(0, SHARDS, 2 * SHARDS) as shown:
        large.notes.append("1-bad: data: cut at byte 7")
        shown(large)
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "1-bad: data: cut at byte 7\n" in said
    assert re.search(r"^100000/100000 shards \| 200,000 images \| .* images/s \| ETA 0:00 \| 0 rows not ok", said, re.M)
