"""Send a job to a Ray cluster through the Jobs API of its dashboard, follow its log and return its exit code."""

import asyncio
import ipaddress
import itertools
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception_message,
    retry_if_exception_type,
    stop_after_delay,
    wait_fixed,
)

from saltern import __version__
from saltern.pipeline.naming import install_hint
from saltern.pipeline.submit.staging import Submission
from saltern.schemas.errors import UserError

CONNECT_S = 10.0
QUIET_S = 20.0  # a log without news is opened again, in case its connection was lost without notice
PATIENCE_S = 60.0  # a cluster may be unreachable, or its head start, for this long
PAUSE_S = 1.0  # before the next try
STOPPED = 130  # exit code of a job that somebody stopped
_TOKEN = "the head's token in RAY_AUTH_TOKEN, in a file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"  # noqa: S105


def job_client(address: str) -> Any:
    """Return a JobSubmissionClient after trying its address and token. Raises UserError."""
    _check_reachable(address)
    # Ray lets RAY_ADDRESS override the address given; only this variable takes precedence over it.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    logging.disable(logging.WARNING)  # Ray's notes on uploads and tokens
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(_explain_refusal(address, str(error))) from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        if "ray[default]" in str(error):
            raise UserError(f"saltern submit needs Ray's job client: {install_hint('submit')}") from error
        raise UserError(f"the server at {address} is not a Ray dashboard: {_last_line(error)}") from error


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing accepts a connection; Ray's client would wait for minutes."""
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"{address!r} is not the address of a dashboard; give --address http://HOST:8265")
    try:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        socket.create_connection((url.hostname, port), CONNECT_S).close()
    except (OSError, ValueError) as error:
        fix = "is the head up, its dashboard on that port, and the network open (ssh -L 8265:127.0.0.1:8265 HEAD)?"
        raise UserError(f"nothing answers at {address} ({error}): {fix}") from error


def _explain_refusal(address: str, error: str) -> str:
    if error.startswith("Authentication failed"):
        return f"{address} refuses this token; give {_TOKEN}"
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return f"{address} asks for a token; set RAY_AUTH_MODE=token and give {_TOKEN}"
    return f"RAY_AUTH_MODE is token, but no token was found; give {_TOKEN}"


def sends_token_in_clear(address: str) -> bool:
    """Return whether requests to `address` carry the token over a network in plain text."""
    url = urlsplit(address)
    if url.scheme != "http" or os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return False
    try:
        return not ipaddress.ip_address(url.hostname or "").is_loopback
    except ValueError:
        return url.hostname != "localhost"


def submit(client: Any, submission: Submission, folder: Path) -> tuple[str, bool]:
    """Start the job, unless the same job is pending or running.

    Ray never frees an id. If the same job has ended, the new one gets the id with a number behind it, and resumes
    from the receipts.

    Returns:
        The submission id, and whether this call started the job.

    Raises:
        UserError: the cluster refuses the job.
    """
    base = f"saltern-{submission.command.replace(' ', '-')}-{submission.fingerprint[:8]}"
    for count in itertools.count(1):
        name = base if count == 1 else f"{base}-{count}"
        try:
            if _start(client, name, submission, folder):
                return name, True
            if not client.get_job_status(name).is_terminal():
                return name, False
        except (RuntimeError, OSError) as error:
            raise UserError(f"the cluster refuses the job: {_last_line(error)}") from error
    raise AssertionError("count has no end")


def _start(client: Any, name: str, submission: Submission, folder: Path) -> bool:
    """Submit under an id. Returns False if the id is in use."""
    metadata = {
        "saltern.command": submission.command,
        "saltern.fingerprint": submission.fingerprint,
        "saltern.version": __version__,
        **({"saltern.out": submission.out} if submission.out else {}),
    }
    environment = {"working_dir": str(folder)}
    # A head that has just started accepts connections before it accepts jobs.
    starting = retry_if_exception_message(match=".*No available agent")
    patience = Retrying(stop=stop_after_delay(PATIENCE_S), wait=wait_fixed(PAUSE_S), retry=starting, reraise=True)
    try:
        patience(
            client.submit_job,
            entrypoint=submission.entrypoint,
            submission_id=name,
            runtime_env=environment,
            metadata=metadata,
        )
    except RuntimeError as error:
        if "already exists" in str(error):  # Ray answers with status 500 and a traceback
            return False
        raise
    return True


def follow(client: Any, name: str, write: Callable[[str], object]) -> tuple[int, str]:
    """Pass the job's log to `write` until the job ends.

    Returns:
        The job's exit code, and how it ended; empty if the log shows it.

    Raises:
        UserError: the cluster stays unreachable for PATIENCE_S.
    """
    info = asyncio.run(_follow(client, name, write))
    code = info.driver_exit_code
    if info.status == "SUCCEEDED":
        return 0, ""
    if info.status == "STOPPED":
        return STOPPED, "was stopped"
    if code is None:
        return 1, f"failed before it ran: {_last_line(info.message or 'no reason given')}"
    return (128 - code if code < 0 else code or 1), ""  # 128 + signal, as in a shell


async def _follow(client: Any, name: str, write: Callable[[str], object]) -> Any:
    """Write the whole log once. Returns the job's last JobDetails."""
    written = 0  # characters
    while True:
        seen, chunks = 0, client.tail_job_logs(name)
        while text := await _next_chunk(chunks):  # each connection starts from the log's first line
            seen += len(text)
            if seen > written:
                write(text[written - seen :])
                written = seen
        info = await _ask(client.get_job_info, name)
        if info.status.is_terminal():
            log = await _ask(client.get_job_logs, name)
            write(log[written:])  # the tail may end before the log does
            return info
        await asyncio.sleep(PAUSE_S)


async def _next_chunk(chunks: AsyncIterator[str]) -> str | None:
    """Return the next lines of a log; None if it ends, is quiet for long, or its connection breaks."""
    import aiohttp

    try:
        return await asyncio.wait_for(anext(chunks, None), QUIET_S)
    except (aiohttp.ClientError, OSError, RuntimeError):
        return None


async def _ask(call: Callable[[str], Any], name: str) -> Any:
    """Ask the head about a job, repeatedly for PATIENCE_S. Raises UserError if it stays unreachable."""
    retry = retry_if_exception_type((OSError, RuntimeError))
    patience = AsyncRetrying(stop=stop_after_delay(PATIENCE_S), wait=wait_fixed(PAUSE_S), retry=retry, reraise=True)
    try:
        return await patience(asyncio.to_thread, call, name)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"lost the cluster while following {name} ({_last_line(error)}); the job may still run"
        ) from error


def _last_line(error: object) -> str:
    """Return the first line of a message, or the last line of a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback" in lines[0] else 0][:300]
