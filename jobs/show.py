"""saltern show: look at a run."""

from pathlib import Path
from typing import Annotated

import typer


def show(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Folders or URLs of runs; of several, the maps side by side.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE.html",
            help="Where the page goes; default: show.html in the run, ./show.html for several or a URL.",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="score, mask_area, ..., lowest first; status, failed rows first."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 48,
) -> None:
    """Make a page of images with their maps, masks and boxes: one HTML file that needs nothing else.

    Of several runs, one image a line under all their maps.
    """
    from saltern.pipeline.runs.reader import open_run
    from saltern.pipeline.show.sheet import comparison, contact_sheet
    from saltern.schemas.errors import ShardError, UserError

    found = [open_run(run) for run in runs]
    page = out or (Path(runs[0]) if len(runs) == 1 and found[0].store.local else Path()) / "show.html"
    try:
        made = contact_sheet(found[0], sort, limit) if len(runs) == 1 else comparison(found, sort, limit)
    except ShardError as error:
        raise UserError(str(error)) from error
    try:
        page.write_text(made, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {page} ({error.strerror}); name another with --out") from error
    typer.echo(page)
