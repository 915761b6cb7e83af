"""saltern show: look at a run."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import RunFolder


def show(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.html", help="Where the page goes; default: RUN/show.html, ./show.html for a URL."),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="score, mask_area, ..., lowest first; status, failed rows first."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 48,
) -> None:
    """Make a page of images with their maps, masks and boxes: one HTML file that needs nothing else."""
    from pipeline.contact_sheet import contact_sheet
    from pipeline.reader import open_run
    from schemas.errors import ShardError, UserError

    found = open_run(run)
    page = out or (Path(run) if found.store.local else Path()) / "show.html"
    try:
        made = contact_sheet(found, sort, limit)
    except ShardError as error:
        raise UserError(str(error)) from error
    try:
        page.write_text(made, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {page} ({error.strerror}); name another with --out") from error
    typer.echo(page)
