"""Markdown tables, readable as plain text too."""

from collections.abc import Iterable, Sequence

from saltern.schemas.errors import printable

ALIGNED = 40  # characters; longer cells are not padded, so that a terminal does not wrap blanks


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns, without a newline at its end.

    Args:
        heads: one per column.
        rows: their cells; pipes and control characters are escaped, and line breaks become blanks.

    Raises:
        ValueError: a row does not have as many cells as there are heads.
    """
    lines = [[_escaped(cell) for cell in line] for line in (heads, *rows)]
    widths = [min(ALIGNED, max(map(len, column))) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _escaped(cell: str) -> str:
    return printable(cell.replace("|", r"\|").replace("\n", " "))
