"""saltern show: make a page with the images, maps, masks and boxes of a run."""

from pathlib import Path
from typing import Annotated

from saltern.jobs import options as opt


def show(
    runs: opt.RunFolders,
    shards: Annotated[
        list[str] | None,
        opt.inputs("Where the runs' shards are now, if they were moved; repeatable, quote globs.", metavar="SHARDS"),
    ] = None,
    out: Annotated[
        Path | None,
        opt.output("Page to write; default: RUN/show.html, or ./show.html for several runs or a URL.", metavar="FILE"),
    ] = None,
    sort: Annotated[
        str | None,
        opt.output(
            "Sort by a metric that RUN/metrics has, as le (worst first), by score, mask_area, ... (lowest first) or by "
            "status (failed first).",
            metavar="COLUMN",
        ),
    ] = None,
    limit: Annotated[int, opt.output("Rows to show.", min=1)] = 48,
) -> None:
    """Make one HTML page of images with their maps, masks and boxes, which needs no other file.

    With several runs, each image has the maps of all runs side by side.
    """
    import uuid

    from saltern.pipeline.runs.reader import open_run
    from saltern.pipeline.show.sheet import comparison, contact_sheet
    from saltern.schemas.errors import ShardError, UserError

    opened = [open_run(run, shards or []) for run in runs]
    page = out or (Path(runs[0]) if len(runs) == 1 and opened[0].store.local else Path()) / "show.html"
    try:
        html = contact_sheet(opened[0], sort, limit) if len(runs) == 1 else comparison(opened, sort, limit)
    except ShardError as error:
        raise UserError(str(error)) from error
    if page.is_symlink():
        raise UserError(f"{page} is a link, which may lead anywhere; name another file with --out")
    unfinished = page.with_name(f".{uuid.uuid4().hex}")
    try:
        with open(unfinished, "x", encoding="utf-8", errors="backslashreplace") as stream:  # x follows no link
            stream.write(html)
        unfinished.replace(page)
    except OSError as error:
        raise UserError(f"cannot write {page} ({error.strerror}); name another with --out") from error
    finally:
        unfinished.unlink(missing_ok=True)
    opt.say(page)
