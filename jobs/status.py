"""saltern status: how far a run is."""

import typer

from saltern.jobs.options import AsJson, RunFolder


def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Show how many shards of a run are done, its rows by status, and its failures.

    The exit code is 1 if shards failed.
    """
    import json
    from dataclasses import asdict

    from saltern.pipeline.runs.manifest import load_run_folder
    from saltern.pipeline.runs.status import run_status
    from saltern.pipeline.synthesis.attack_report import in_words, means
    from saltern.schemas.config import ATTACK, EXTRACT

    store, manifest = load_run_folder(run)
    found = run_status(store, manifest)
    attacked = means(store, manifest) if found.job == ATTACK else {}
    if as_json:
        summary = {"run": run, **asdict(found)} | ({"means": attacked} if attacked else {})
        typer.echo(json.dumps(summary, indent=1))
    else:
        jobs = {EXTRACT: found.method, ATTACK: f"attack guided by {found.method}"}
        rows = ", ".join(f"{count:,} {name}" for name, count in found.rows.items()) or "none"
        typer.echo(f"{run}: {jobs.get(found.job, found.job)} of {found.model}, fingerprint {found.fingerprint}")
        typer.echo(f"{found.done} of {found.shards} shards done, {found.samples:,} samples; rows: {rows}")
        if attacked:
            typer.echo(in_words(attacked))
        for shard, reason in found.failures.items():
            typer.echo(f"{shard}: {reason}")
    raise typer.Exit(1 if found.failures else 0)
