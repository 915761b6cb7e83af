"""Processes that are forked from one, which imports everything once: two ranks of a training, or a command."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from making import HELPERS, PYTHONPATH

from saltern.pipeline.training.ranks import Ranks
from saltern.schemas.errors import UserError

# What trainings import: torch's optimizers import _dynamo at their first step, which takes as long as torch itself.
_PRELOADED = ["casm_toys", "localizer_toys", "torch._dynamo", "ray.train.torch", "saltern.jobs.main"]


@pytest.fixture(scope="session")
def forking() -> ForkServerContext:
    """Return the context whose processes are forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def in_ranks(forking, tmp_path_factory) -> Iterator[Callable[..., list[Any]]]:
    """Return a function in_ranks(job, *words) that gives the results of `job(ranks, *words)` in two processes."""
    with forking.Pool(2) as pool:

        def each(job: Callable[..., Any], *words: object) -> list[Any]:
            meeting = tmp_path_factory.mktemp("meeting") / "file"
            return pool.starmap(_guarded, [(job, rank, meeting, words) for rank in range(2)], chunksize=1)

        yield each
        pool.close()
        pool.join()


def _guarded(job: Callable[..., Any], rank: int, meeting: Path, words: tuple[object, ...]) -> Any:
    """Return the result of a job in one of two ranks; for a UserError, its text."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        return job(Ranks(torch.device("cpu"), rank, 2, 2), *words)
    except UserError as error:
        return f"UserError: {error}"
    finally:
        dist.destroy_process_group()


def start(forking: ForkServerContext, log: Path, *words: object) -> BaseProcess:
    """Start `saltern` with these words. `log` gets what it says."""
    process = forking.Process(target=_command, args=(log, [str(word) for word in words]))
    process.start()
    return process


def _command(log: Path, words: list[str]) -> None:
    from saltern.jobs.main import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(HELPERS)
    torch.set_num_threads(1)
    sys.argv = ["saltern", *words]
    main()
