"""saltern status: show the progress of a run."""

import typer

from saltern.jobs.options import AsJson, RunFolder, say


def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Show how many shards of a run are done, its rows by status, and its failures.

    The exit code is 1 if shards failed, data files are missing or less than half of the rows are ok.
    """
    import json
    from dataclasses import asdict

    from saltern.pipeline.runs.manifest import load_run_folder
    from saltern.pipeline.runs.status import run_status
    from saltern.schemas.config import ATTACK, EXTRACT
    from saltern.schemas.text import counted

    store, manifest = load_run_folder(run)
    progress = run_status(store, manifest)
    attacked = {}
    if progress.job == ATTACK:
        from saltern.pipeline.synthesis.attack_report import in_words, means  # imports torch

        attacked = means(store, manifest)
    if as_json:
        summary = {"run": run, **asdict(progress)} | ({"means": attacked} if attacked else {})
        typer.echo(json.dumps(summary, indent=1))
    else:
        jobs = {EXTRACT: progress.method, ATTACK: f"attack guided by {progress.method}"}
        rows = ", ".join(f"{count:,} {name}" for name, count in progress.rows.items()) or "none"
        job = jobs.get(progress.job, progress.job)
        say(f"{run}: {job} of {progress.model}, fingerprint {progress.fingerprint}")
        say(f"{progress.done} of {progress.shards} shards done, {counted(progress.samples, 'sample')}; rows: {rows}")
        if attacked:
            say(in_words(attacked))
        for reason, count in progress.reasons.items():
            say(f"{counted(count, 'row')} {reason}")
        if progress.problem:
            say(f"FAILED: {progress.problem}")
        if progress.warning:
            say(f"WARNING: {progress.warning}")
        for shard, reason in progress.invalid.items():
            say(f"{shard}: not done, although it has a receipt: {reason}; the same command makes it again")
        for shard, reason in progress.failures.items():
            say(f"{shard}: {reason}")
    raise typer.Exit(1 if progress.failures or progress.invalid or progress.problem else 0)
