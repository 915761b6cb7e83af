"""saltern status: how far a run is."""

import typer

from saltern.jobs.options import AsJson, RunFolder


def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Show what stands of a run: shards, rows by status, failures. Exit code 1 where shards failed."""
    import json
    from collections import Counter

    from saltern.pipeline.runs.manifest import load_run_folder, read_failures, read_receipts
    from saltern.pipeline.synthesis.attack_report import in_words, means
    from saltern.schemas.run import ATTACK, EXTRACT

    store, found = load_run_folder(run)
    receipts = read_receipts(store, found)
    failures = read_failures(store, receipts)
    statuses = sum((Counter(receipt.statuses) for receipt in receipts.values()), Counter[str]())
    summary = {
        "run": run,
        "fingerprint": found.fingerprint,
        "job": found.config.job,
        "model": found.config.model,
        "method": found.config.method,
        "shards": len(found.shards),
        "done": len(receipts),
        "samples": sum(receipt.samples for receipt in receipts.values()),
        "rows": dict(statuses.most_common()),
        "data_bytes": sum(receipt.data_bytes for receipt in receipts.values()),
        "failures": {failure.shard: f"{failure.kind}: {failure.reason}" for failure in failures.values()},
    }
    attacked = means(store, found) if found.config.job == ATTACK else {}
    if attacked:
        summary["means"] = attacked
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
    else:
        rows = ", ".join(f"{count:,} {status}" for status, count in statuses.most_common()) or "none"
        named = {EXTRACT: found.config.method, ATTACK: f"attack guided by {found.config.method}"}
        what = named.get(found.config.job, found.config.job)
        typer.echo(f"{run}: {what} of {found.config.model}, fingerprint {found.fingerprint}")
        typer.echo(f"{len(receipts)} of {len(found.shards)} shards stand, {summary['samples']:,} samples; rows: {rows}")
        if attacked:
            typer.echo(in_words(attacked))
        for failure in failures.values():
            typer.echo(f"{failure.shard}: {failure.kind}: {failure.reason}")
    raise typer.Exit(1 if failures else 0)
