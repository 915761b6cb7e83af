"""saltern submit: send any saltern command to a Ray cluster."""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from saltern.pipeline.submit.staging import Word


def submit(
    ctx: typer.Context,
    address: Annotated[
        str,
        typer.Option(envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="URL of the cluster's dashboard."),
    ] = "http://127.0.0.1:8265",
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's log to its end, and exit with the job's exit code.")
    ] = False,
) -> None:
    """Send a command to a Ray cluster: saltern submit [--address URL] [--follow] -- extract SHARDS... --out RUN ...

    The PATH on the head decides which python runs the job. Saltern's code travels with it,
    and so do --config, @list.txt and a module of your own, up to 1 MB each.
    The cluster must see all other paths; relative paths are made absolute.
    The same command again does not start a second job: while the job runs, --follow attaches to it;
    when it has ended, it is resumed.
    To give a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or write ~/.ray/auth_token.
    """
    from saltern.pipeline.submit import submission as cluster
    from saltern.pipeline.submit.staging import stage

    command, words = parse(ctx.find_root(), ctx.args)
    with tempfile.TemporaryDirectory(prefix="saltern-") as folder:
        submission = stage(command, words, Path(folder), Path.cwd())
        if submission.absolute:
            typer.echo(f"paths that the cluster must see: {', '.join(submission.absolute)}", err=True)
        if cluster.sends_token_in_clear(address):
            typer.echo(f"warning: the token goes to {address} in plain text; use https or an ssh tunnel", err=True)
        client = cluster.job_client(address)
        name, started = cluster.submit(client, submission, Path(folder))
    again = shlex.join(["saltern", "submit", "--address", address, "--follow", "--", *ctx.args])
    if follow:
        typer.echo(f"{'started' if started else 'already running:'} {name} at {address}", err=True)
        raise typer.Exit(_follow(client, name, again))
    typer.echo(f"{'' if started else 'this job is already running; '}follow it with: {again}", err=True)
    typer.echo(name)


def _follow(client: Any, name: str, again: str) -> int:
    """Print the job's log. Returns its exit code."""
    from saltern.pipeline.submit.submission import STOPPED, follow

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code, end = follow(client, name, write)
    except KeyboardInterrupt:
        typer.echo(f"\n{name} keeps running; follow it again with: {again}", err=True)
        return STOPPED
    if end:
        typer.echo(f"{name} {end}", err=True)
    return code


def parse(root: Any, args: list[str]) -> tuple[str, list["Word"]]:
    """Return the command in `args` and its arguments, in the order that the command declares them.

    Raises a usage error, as the command itself would.
    """
    from saltern.pipeline.submit.staging import Word

    ctx, command = root, root.command
    while hasattr(command, "commands"):
        if not args or args[0] == "submit":
            ctx.fail(f"no command to run; give it as in: {ctx.command_path} submit -- extract SHARDS... --out RUN")
        name, command, args = command.resolve_command(ctx, args)
        ctx = command.context_class(command, info_name=name, parent=ctx)
    given, _, order = command.make_parser(ctx).parse_args(list(args))
    words = []
    for param in command.get_params(ctx):
        if param not in order:
            continue
        value = given[param.name]
        if isinstance(value, bool):
            words.append(Word(param.name, (param.opts if value else param.secondary_opts)[0], None))
            continue
        flag = max(param.opts, key=len) if param.param_type_name == "option" else None
        words += [Word(param.name, flag, part) for part in ([value] if isinstance(value, str) else value or [])]
    return ctx.command_path.removeprefix(f"{root.command_path} "), words
