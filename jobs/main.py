"""The command `saltern`: one verb a file; every heavy import stands inside its command."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from saltern.jobs.attack import attack
from saltern.jobs.bench import app as bench
from saltern.jobs.demo import demo
from saltern.jobs.evaluate import evaluate
from saltern.jobs.extract import extract
from saltern.jobs.listing import methods, models
from saltern.jobs.pack import pack
from saltern.jobs.plan import plan
from saltern.jobs.show import show
from saltern.jobs.status import status
from saltern.jobs.submit import submit
from saltern.jobs.train_casm import train_casm
from saltern.jobs.unseen_classes import unseen_classes
from saltern.jobs.verify import verify
from saltern.jobs.visualize_class import visualize_class
from saltern.pipeline.machine import keep_memory
from saltern.schemas.errors import UserError

EXIT_CODES = (
    "Exit codes: 0 all is done; 1 some shards failed, or a check did not hold; 2 a wrong call, said in one line; "
    "3 an error in the code, with its traceback; 130 interrupted."
)

app = typer.Typer(
    help="Harvest saliency maps, masks and boxes from whole image datasets, exactly once.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: list[Callable[..., Any]] = [
    pack,
    plan,
    extract,
    attack,
    visualize_class,
    train_casm,
    unseen_classes,
    status,
    verify,
    show,
    evaluate,
    methods,
    models,
    demo,
]
for _command in _COMMANDS:
    app.command(epilog=EXIT_CODES)(_command)
app.command(epilog=EXIT_CODES, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line. A user's error is one line on stderr and exit code 2."""
    keep_memory()
    try:
        app()
    except UserError as error:
        print(f"saltern: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("saltern: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(3)


if __name__ == "__main__":
    main()
