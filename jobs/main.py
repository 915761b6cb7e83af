"""The command `saltern`. Each sub-command has its own file, and imports heavy modules only when it runs."""

import contextlib
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from saltern import __version__
from saltern.jobs.attack import attack
from saltern.jobs.bench import app as bench
from saltern.jobs.demo import demo
from saltern.jobs.evaluate import evaluate
from saltern.jobs.export import export
from saltern.jobs.extract import extract
from saltern.jobs.layers import layers
from saltern.jobs.leaderboard import leaderboard
from saltern.jobs.listing import methods, metrics, models
from saltern.jobs.pack import pack
from saltern.jobs.plan import plan
from saltern.jobs.sanity import sanity
from saltern.jobs.show import show
from saltern.jobs.status import status
from saltern.jobs.submit import submit
from saltern.jobs.train_casm import train_casm
from saltern.jobs.train_localizer import train_localizer
from saltern.jobs.unseen_classes import unseen_classes
from saltern.jobs.verify import verify
from saltern.jobs.visualize_class import visualize_class
from saltern.pipeline.machine import exit_on_signals, keep_memory, signals_as_interrupts
from saltern.schemas.errors import CollapseError, UserError, printable

EXIT_CODES = (
    "Exit codes: 0 everything is done; 1 some shards failed, less than half of the rows are ok, or a check failed; "
    "2 a wrong call, explained in one line; 3 an error in the code, with its traceback; "
    "75 the GPU was lost, and the same command goes on; 130 interrupted."
)

app = typer.Typer(
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: dict[str, list[Callable[..., Any]]] = {
    "Datasets of saliency": [pack, plan, extract, status, verify, show, evaluate, leaderboard, layers, sanity, export],
    "Other jobs": [attack, visualize_class, train_casm, unseen_classes, train_localizer],
    "Help and tools": [methods, models, metrics, demo],
}
for _panel, _commands in _COMMANDS.items():
    for _command in _commands:
        app.command(epilog=EXIT_CODES, rich_help_panel=_panel)(_command)
app.command(
    epilog=EXIT_CODES,
    rich_help_panel="Help and tools",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(submit)
app.add_typer(bench, name="bench", rich_help_panel="Help and tools")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"saltern {__version__}")
        raise typer.Exit


@app.callback()
def saltern(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Harvest saliency maps, masks and boxes from whole image datasets, each sample exactly once."""


_UsageError: Any = typer.BadParameter.__base__  # typer exports only this child of it


def main() -> None:
    """Run the command line. A wrong call is one line on stderr and exit code 2."""
    keep_memory()
    signals_as_interrupts()
    try:
        code = app(prog_name="saltern", standalone_mode=False)
    except CollapseError as error:
        _fail(1, str(error))
    except UserError as error:
        _fail(2, str(error))
    except _UsageError as error:
        _fail(2, error.format_message().replace("Value error, ", ""))  # pydantic's message
    except (KeyboardInterrupt, typer.Abort):
        _fail(130, "interrupted")
    except OSError as error:  # of a file or a store: the environment, not the code
        _fail(2, f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except Exception:
        sys.excepthook(*sys.exc_info())
        _end(3)
    _end(code or 0)


def _fail(code: int, message: str) -> NoReturn:
    if message:  # without arguments, the message is empty and the help is printed already
        print(f"saltern: {printable(' '.join(message.split()))}", file=sys.stderr)
    _end(code)


def _end(code: int) -> NoReturn:
    """Leave the process, also with this code if a signal arrives meanwhile."""
    with contextlib.suppress(OSError):  # a closed pipe
        sys.stdout.flush()
    exit_on_signals(code)
    sys.exit(code)
