"""saltern submit: send any saltern job to a Ray cluster."""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer


def submit(
    ctx: typer.Context,
    address: Annotated[
        str,
        typer.Option(envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="URL of the cluster's dashboard."),
    ] = "http://127.0.0.1:8265",
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's log to its end, and end with its exit code.")
    ] = False,
) -> None:
    """Send a job to a Ray cluster: saltern submit [--address URL] [--follow] -- extract SHARDS... --out RUN ...

    The head's PATH decides which python runs it. Our code travels with it,
    and so do --config, @list.txt and a module of your own, up to 1 MB each.
    The cluster must see all other paths; relative ones are made absolute.
    Sent twice, a job runs once: --follow attaches to it while it runs, and
    the same command resumes it when it has ended.
    A token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
    ~/.ray/auth_token.
    """
    from saltern.pipeline.submit import submission
    from saltern.pipeline.submit.staging import stage

    command, words = _parse(ctx.args)
    with tempfile.TemporaryDirectory(prefix="saltern-") as folder:
        job = stage(command, words, Path(folder), Path.cwd())
        if job.absolute:
            typer.echo(f"paths that the cluster must see: {', '.join(job.absolute)}", err=True)
        if submission.token_in_clear(address):
            typer.echo(f"warning: the token goes to {address} in plain text; use https or an ssh tunnel", err=True)
        client = submission.connect(address)
        name, started = submission.submit(client, job, Path(folder))
    again = shlex.join(["saltern", "submit", "--address", address, "--follow", "--", *ctx.args])
    if follow:
        typer.echo(f"{'started' if started else 'runs already:'} {name} at {address}", err=True)
        raise typer.Exit(_follow(client, name, again))
    said = "follow it with" if started else "this job runs already; follow it with"
    typer.echo(f"{said}: {again}", err=True)
    typer.echo(name)


def _follow(client: Any, name: str, again: str) -> int:
    from saltern.pipeline.submit import submission

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code, words = submission.follow(client, name, write)
    except KeyboardInterrupt:
        typer.echo(f"\n{name} goes on without you; follow it again with: {again}", err=True)
        return 130
    if words:
        typer.echo(f"{name} {words}", err=True)
    return code


def _parse(args: list[str]) -> tuple[str, list[Any]]:
    """The command and its words, checked against our own command line. Raises UserError."""
    from saltern.pipeline.submit.staging import Word
    from saltern.schemas.errors import UserError

    names, command = _command(args)
    ctx = command.make_context(names[-1], [], resilient_parsing=True)  # a context alone: nothing is checked or run
    ctx.resilient_parsing = False
    try:
        given, _, order = command.make_parser(ctx).parse_args(args[len(names) :])
    except Exception as error:  # typer's usage errors have no public name of their own
        if not hasattr(error, "format_message"):
            raise
        raise UserError(f"{' '.join(names)}: {error.format_message()}") from error
    words = []
    for param in (param for param in command.get_params(ctx) if param in order):
        value = given[param.name]
        positional = param.param_type_name == "argument"
        if isinstance(value, bool):
            words.append(Word(param.name, (param.opts if value else param.secondary_opts)[0], None))
            continue
        values = [value] if isinstance(value, str) else value or []
        flag = None if positional else max(param.opts, key=len)
        words += [Word(param.name, flag, part) for part in values]
    return " ".join(names), words


def _command(args: list[str]) -> tuple[list[str], Any]:
    """The names at the head of `args`, and the command they lead to."""
    from saltern.jobs.main import app
    from saltern.schemas.errors import UserError

    names: list[str] = []
    command: Any = typer.main.get_group(app)
    while hasattr(command, "commands"):
        name = args[len(names)] if len(args) > len(names) else ""
        known = sorted(set(command.commands) - {"submit"})
        if name not in known:
            start = " ".join(["saltern submit --", *names])
            raise UserError(f"say what to run, as in `{start} COMMAND ...`; {name!r} is none of {', '.join(known)}")
        names.append(name)
        command = command.commands[name]
    return names, command
