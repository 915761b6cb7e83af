"""saltern verify: check that a run is complete and intact."""

from typing import Annotated

import typer

from saltern.jobs import options as opt


def verify(
    run: opt.RunFolder,
    more: opt.MoreShards = None,
    shards: Annotated[
        list[str] | None, opt.inputs("Where its shards are now, if they were moved.", metavar="SHARDS...")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Check a run's digests, fingerprints and keys: every sample must have exactly its rows.

    Lists the problems, each with its fix. If it finds any, the exit code is 1. Says which tars could not be compared.
    """
    import json
    from dataclasses import asdict

    from saltern.pipeline.runs.manifest import load_run_folder
    from saltern.pipeline.runs.places import move
    from saltern.pipeline.runs.verify import verify as check
    from saltern.schemas.text import counted

    store, manifest = load_run_folder(run)
    # If the shell expands a glob, `--shards` takes the first path and the others come as arguments.
    verdict = check(store, move(run, manifest, [*(shards or []), *(more or [])])[0])
    if as_json:
        typer.echo(json.dumps(asdict(verdict), indent=1))
    else:
        for finding in verdict.findings:
            opt.say(f"{finding.shard}: {finding.reason}; {finding.fix}")
        for reason, count in verdict.reasons.items():
            opt.say(f"{counted(count, 'row')} {reason}")
        if verdict.warning:
            opt.say(f"WARNING: {verdict.warning}")
        for reason, (count, first) in verdict.unproven.items():
            opt.say(f"NOT PROVEN: the keys of {counted(count, 'shard')} (the first is {first}): {reason}")
        word = counted(len(verdict.findings), "problem") if verdict.findings else "no problems"
        opt.say(
            f"{word}: {verdict.done} of {verdict.shards} shards done, {counted(verdict.samples, 'sample')}, "
            f"{counted(verdict.rows, 'row')}; {counted(verdict.recounted, 'tar')} counted again"
        )
    raise typer.Exit(1 if verdict.findings else 0)
