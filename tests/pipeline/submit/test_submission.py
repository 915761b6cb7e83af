"""Follow jobs on a cluster with a fake dashboard."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from saltern.pipeline.submit import submission
from saltern.pipeline.submit.staging import Submission
from saltern.schemas.errors import UserError


@pytest.mark.parametrize(
    ("address", "mode", "clear"),
    [
        ("http://10.0.0.5:8265", "token", True),
        ("http://head.example:8265", "token", True),
        ("http://10.0.0.5:8265", "disabled", False),
        ("https://head.example", "token", False),
        ("http://127.0.0.1:8265", "token", False),
        ("http://[::1]:8265", "token", False),
        ("http://localhost:8265", "token", False),
    ],
)
def test_a_token_in_clear_is_seen(monkeypatch: pytest.MonkeyPatch, address: str, mode: str, clear: bool) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert submission.sends_token_in_clear(address) is clear


class Flaky:
    """A dashboard whose connections break: each tail sends one more line of the log from its start, then breaks."""

    log = "one\ntwo\nthree\nfour\n"

    def __init__(self) -> None:
        self.tails = 0

    async def tail_job_logs(self, name: str) -> Any:
        self.tails += 1
        for line in self.log.splitlines(keepends=True)[: self.tails]:
            yield line
        raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, name: str) -> Any:
        from ray.job_submission import JobStatus

        status = JobStatus.RUNNING if self.tails < 3 else JobStatus.SUCCEEDED
        return type("Info", (), {"status": status, "driver_exit_code": 0, "message": None})

    def get_job_logs(self, name: str) -> str:
        return self.log


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PAUSE_S", 0.01)


class Starting:
    """A head whose agent for jobs starts late."""

    def __init__(self, late: int, error: str = "No available agent to submit job, please try again later."):
        self.late, self.error = late, error

    def submit_job(self, **job: Any) -> str:
        self.late -= 1
        if self.late >= 0:
            raise RuntimeError(f"Request failed with status code 500: {self.error}")
        return str(job["submission_id"])


JOB = Submission("status", [], None, "0123456789", [])


def test_a_head_that_starts_gets_the_job_when_it_can(tmp_path: Path) -> None:
    assert submission.submit(Starting(2), JOB, tmp_path) == ("saltern-status-01234567", True)


def test_another_refusal_of_the_head_is_no_reason_to_wait(tmp_path: Path) -> None:
    head = Starting(2, "disk full")
    with pytest.raises(UserError, match=r"the cluster refuses the job: .*disk full"):
        submission.submit(head, JOB, tmp_path)
    assert head.late == 1


def test_each_line_of_the_log_comes_once() -> None:
    written: list[str] = []
    assert submission.follow(Flaky(), "x", written.append) == (0, "")
    assert "".join(written) == Flaky.log


def test_a_lost_cluster_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Flaky):
        def get_job_info(self, name: str) -> Any:
            raise ConnectionError("refused")

    monkeypatch.setattr(submission, "PATIENCE_S", 0)
    with pytest.raises(UserError, match="lost the cluster while following x"):
        submission.follow(Gone(), "x", lambda text: None)


def test_a_closed_stdout_ends_the_following() -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        submission.follow(Flaky(), "x", closed)


@pytest.mark.parametrize(("code", "ours"), [(0, 1), (None, 1), (7, 7), (-9, 137)])
def test_the_exit_code_of_a_failed_job(code: int | None, ours: int) -> None:
    from ray.job_submission import JobStatus

    class Failed(Flaky):
        def get_job_info(self, name: str) -> Any:
            return type("Info", (), {"status": JobStatus.FAILED, "driver_exit_code": code, "message": "no python\nx"})

    got, said = submission.follow(Failed(), "x", lambda text: None)
    assert got == ours
    assert said == ("" if code is not None else "failed before it ran: no python")


def test_a_quiet_connection_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that was lost without notice sends nothing and never ends."""

    class Quiet(Flaky):
        async def tail_job_logs(self, name: str) -> Any:
            self.tails += 1
            yield "one\n"
            await asyncio.sleep(60)

    monkeypatch.setattr(submission, "QUIET_S", 0.01)
    written: list[str] = []
    assert submission.follow(Quiet(), "x", written.append) == (0, "")
    assert "".join(written) == Flaky.log
