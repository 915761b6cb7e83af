"""saltern methods, saltern models, saltern metrics: list the names to choose from."""

from typing import TYPE_CHECKING

import typer

from saltern.jobs.options import AsJson

if TYPE_CHECKING:
    from saltern.pipeline.methods.options import OptionSpec

OTHER_METHODS = (
    "captum:NAME runs an attribution of captum (extra `captum`), package.module:Class a method of your own.\n"
    "For --target top:N, the methods of the table share their forward passes; captum's and your own run N times, "
    "unless yours has compute_each."
)
OTHER_MODELS = (
    "timm:NAME, hf:NAME and open_clip:NAME load models of timm, transformers and open_clip (extras `timm`, `hf`, "
    "`clip`), package.module:factory a model of your own."
)


def methods(as_json: AsJson = False) -> None:
    """List the saliency methods: their purpose, cost, and options with defaults and choices."""
    import json

    from saltern.pipeline.methods import available

    kinds = available()
    if as_json:
        described = [
            {
                "name": name,
                "summary": kind.summary(),
                "cost": kind.cost,
                "shares_forward": kind.shares_forward(),  # between the targets of top:N
                "options": [spec._asdict() for spec in kind.option_specs()],
            }
            for name, kind in kinds.items()
        ]
        typer.echo(json.dumps(described, indent=1))
        return
    rows = [
        (name, kind.summary(), kind.cost, "\n".join(map(_option, kind.option_specs()))) for name, kind in kinds.items()
    ]
    _print_table(("method", "what it does", "cost of an image", "options: -O KEY=VALUE"), rows)
    typer.echo(OTHER_METHODS, err=True)


def metrics() -> None:
    """List the metrics of `saltern evaluate`: what each measures, and whether less or more is better."""
    from saltern.pipeline.metrics.families import FAMILIES, option_name

    rows = [
        (option_name(name), family.name, f"{metric.better.value} {metric.title}".strip(), metric.help)
        for family in FAMILIES.values()
        for name, metric in family.metrics.items()
    ]
    _print_table(("metric", "family", "in tables", "what it is"), rows, leading=0)


def models() -> None:
    """List the names of the built-in models."""
    from saltern.pipeline.models.classifiers import available_models

    for name in available_models():
        typer.echo(name)
    typer.echo(OTHER_MODELS, err=True)


def _option(spec: "OptionSpec") -> str:
    """Return `steps=32 (int)` or `reduce=max (max, sum, l2)`."""
    values = spec.values if isinstance(spec.values, str) else ", ".join(map(str, spec.values))
    return f"{spec.name}={spec.default} ({values})"


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]], leading: int = 1) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, leading=leading)
    for number, title in enumerate(head):
        table.add_column(title, no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False, emoji=False).print(table)
