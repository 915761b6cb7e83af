"""Jobs on a Ray cluster through its dashboard's Jobs API: send one, follow its log, tell how it ended."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from saltern.pipeline.submit.staging import Job
from saltern.schemas.errors import UserError

CONNECT_S = 10.0
PATIENCE_S = 60.0  # a followed job's cluster may be out of reach for so long
STOPPED = 130  # the exit code of a job that somebody stopped
_TOKEN = "the head's token in RAY_AUTH_TOKEN, in a file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"  # noqa: S105


def token_in_clear(address: str) -> bool:
    """Whether requests to `address` carry the token over a network in plain text."""
    url = urlsplit(address)
    if url.scheme != "http" or os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return False
    try:
        return not ipaddress.ip_address(url.hostname or "").is_loopback
    except ValueError:
        return url.hostname != "localhost"


def connect(address: str) -> Any:
    """A JobSubmissionClient whose address and token have been tried. Raises UserError."""
    _reach(address)
    # Ray lets RAY_ADDRESS override the address given; only this variable stands above it.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    logging.disable(logging.WARNING)  # its notes on uploads and tokens
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(_auth_words(address, str(error))) from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(f"what answers at {address} is no Ray dashboard: {_gist(error)}") from error


def _reach(address: str) -> None:
    """Ray's client would wait for minutes on an address that swallows packets."""
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"{address!r} is no dashboard address; give --address http://HOST:8265")
    try:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        socket.create_connection((url.hostname, port), CONNECT_S).close()
    except (OSError, ValueError) as error:
        fix = "is the head up, its dashboard on that port, and the network open (ssh -L 8265:127.0.0.1:8265 HEAD)?"
        raise UserError(f"nothing answers at {address} ({error}): {fix}") from error


def _auth_words(address: str, error: str) -> str:
    if error.startswith("Authentication failed"):
        return f"{address} refuses this token; give {_TOKEN}"
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return f"{address} asks for a token; set RAY_AUTH_MODE=token and give {_TOKEN}"
    return f"RAY_AUTH_MODE is token, and no token was found; give {_TOKEN}"


def submit(client: Any, job: Job, folder: Path) -> tuple[str, bool]:
    """Start the job, unless the same one is under way.

    Ray never frees an id, so a job that has ended goes on, by its receipts, under the id with a number behind it.

    Returns:
        its submission id, and whether it was started by this call.
    """
    from ray.job_submission import JobStatus

    for name in _names(f"saltern-{job.command.replace(' ', '-')}-{job.fingerprint[:8]}"):
        with _in_words():
            try:
                client.submit_job(
                    entrypoint=job.entrypoint,
                    submission_id=name,
                    runtime_env={"working_dir": str(folder)},
                    metadata=_metadata(job),
                )
                return name, True
            except RuntimeError as error:
                # Ray answers a re-used id with status 500 and a traceback.
                if "already exists" not in str(error):
                    raise
            if not JobStatus(client.get_job_status(name)).is_terminal():
                return name, False
    raise AssertionError("the names have no end")


def follow(client: Any, name: str, write: Callable[[str], object]) -> tuple[int, str]:
    """Hand the job's log to `write` until the job ends.

    Returns:
        its exit code, and in words how it ended (empty where the log tells it).
    """
    info = asyncio.run(_follow(client, name, write))
    code = info.driver_exit_code
    if info.status == "SUCCEEDED":
        return 0, ""
    if info.status == "STOPPED":
        return STOPPED, "was stopped"
    if code is None:
        return 1, f"failed before it ran: {_gist(info.message or 'no reason given')}"
    # Ended by a signal: as a shell counts it.
    return (128 - code if code < 0 else code or 1), ""


async def _follow(client: Any, name: str, write: Callable[[str], object]) -> Any:
    """The job's last JobDetails, when all of its log is written."""
    written = 0  # characters

    async def tail() -> None:
        nonlocal written
        while True:
            seen, chunks = 0, client.tail_job_logs(name)
            while text := await _next(chunks):
                seen += len(text)
                if seen > written:
                    write(text[written - seen :])
                    written = seen
            # A broken connection starts over from the log's first line; whether the job still runs, the poll knows.
            await asyncio.sleep(1)

    tailing = asyncio.create_task(tail())
    try:
        while not (info := await _ask(client.get_job_info, name)).status.is_terminal():
            done, _ = await asyncio.wait([tailing], timeout=1)
            for task in done:
                task.result()  # only an error of `write` ends it, as a closed stdout does
    finally:
        tailing.cancel()
    # The tail lags behind the end of the job.
    log = await _ask(client.get_job_logs, name)
    write(log[written:])
    return info


async def _next(chunks: AsyncIterator[str]) -> str | None:
    """The next lines of a log; None at its end or where the connection breaks."""
    import aiohttp

    try:
        return await anext(chunks, None)
    except (aiohttp.ClientError, OSError, RuntimeError):
        return None


async def _ask(call: Callable[[str], Any], name: str) -> Any:
    """Ask the head about a job, with patience. Raises UserError when it stays out of reach."""
    retry = retry_if_exception_type((OSError, RuntimeError))
    patience = AsyncRetrying(stop=stop_after_delay(PATIENCE_S), wait=wait_fixed(2), retry=retry, reraise=True)
    try:
        return await patience(asyncio.to_thread, call, name)
    except (OSError, RuntimeError) as error:
        raise UserError(f"lost the cluster while following {name} ({_gist(error)}); the job may still run") from error


def _names(base: str) -> Iterator[str]:
    yield base
    count = 2
    while True:
        yield f"{base}-{count}"
        count += 1


def _metadata(job: Job) -> dict[str, str]:
    """Strings, as Ray demands; `saltern.fingerprint` is that of the job, the run's own stands in its run.json."""
    made = {
        "saltern.command": job.command,
        "saltern.fingerprint": job.fingerprint,
        "saltern.version": version("saltern"),
    }
    return {**made, "saltern.out": job.out} if job.out else made


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """A refusal of the cluster as one line."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise UserError(f"the cluster refuses the job: {_gist(error)}") from error


def _gist(error: object) -> str:
    """One line; of a traceback the last, which names the error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback" in lines[0] else 0][:300]
