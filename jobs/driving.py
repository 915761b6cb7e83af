"""The options that say how a job is driven, for the commands that share them, and the end of such a command."""

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from saltern.pipeline.engine.conduct import Job

Engine = Annotated[str, typer.Option(help="local (this process), ray (actors) or auto.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: $RAY_ADDRESS, or one of our own.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Ray actors; default: one for each GPU.")]
GpusPerWorker = Annotated[
    float | None, typer.Option(min=0, help="GPUs of an actor; fractions allowed; default: 1, on a CPU 0.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run that stands there first.")]
ShardTimeout = Annotated[float | None, typer.Option(min=0, help="Seconds a shard may take.")]
MaxFailedShards = Annotated[int | None, typer.Option(min=0, help="Stop when more have failed.")]


def drive(job: "Job", **settings: Any) -> None:
    """Do the job and leave with its exit code."""
    from saltern.pipeline.engine.conduct import Settings, conduct

    ended = conduct(job, Settings(**settings))
    sys.stdout.flush()
    sys.stderr.flush()
    if ended.stuck:
        os._exit(ended.code)  # a thread is stuck in a shard: an ordinary exit would wait for it
    raise typer.Exit(ended.code)
