"""saltern verify: proof that a run is whole."""

import typer

from saltern.jobs.options import AsJson, RunFolder


def verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Prove that rows in = rows out: digests, fingerprints, keys. Exit code 1 with the list of what does not hold."""
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
        word = f"{len(verdict.findings)} things do not hold" if verdict.findings else "all holds"
        typer.echo(
            f"{word}: {verdict.done} of {verdict.shards} shards, {verdict.samples:,} samples, {verdict.rows:,} rows; "
            f"{verdict.recounted} tars counted again"
        )
    raise typer.Exit(1 if verdict.findings else 0)
