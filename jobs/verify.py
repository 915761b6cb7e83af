"""saltern verify: check that a run is complete and intact."""

import typer

from saltern.jobs.options import AsJson, RunFolder


def verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Check a run's digests, fingerprints and keys: every sample must have exactly its rows.

    Lists the problems. If it finds any, the exit code is 1.
    """
    import json
    from dataclasses import asdict

    from saltern.pipeline.runs.manifest import load_run_folder
    from saltern.pipeline.runs.verify import verify as check

    verdict = check(*load_run_folder(run))
    if as_json:
        typer.echo(json.dumps(asdict(verdict), indent=1))
    else:
        for finding in verdict.findings:
            typer.echo(f"{finding.shard}: {finding.reason}")
        for reason, count in verdict.reasons.items():
            typer.echo(f"{count:,} rows {reason}")
        if verdict.warning:
            typer.echo(f"WARNING: {verdict.warning}")
        word = f"{len(verdict.findings)} problems" if verdict.findings else "no problems"
        typer.echo(
            f"{word}: {verdict.done} of {verdict.shards} shards done, {verdict.samples:,} samples, "
            f"{verdict.rows:,} rows; {verdict.recounted} tars counted again"
        )
    raise typer.Exit(1 if verdict.findings else 0)
