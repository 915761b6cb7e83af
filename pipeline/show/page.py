"""One self-contained HTML page of cards.

A card is an image, followed by a view for each run that explained it.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from saltern.schemas.errors import printable
from saltern.schemas.saliency import OK

Number = int | float | None
FOUND, GIVEN, CROP = "found", "given", "crop"  # kinds of boxes
Place = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of a picture's width and height
WHOLE: Place = (0, 0, 1, 1)


@dataclass(frozen=True)
class DrawnBox:
    """A box drawn over a picture, as shares of the picture's width and height, [0, 1]."""

    kind: str  # FOUND | GIVEN | CROP
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, eq=False)
class Layer:
    """An image that the browser draws over a part of a picture. Pictures of one card may share it."""

    webp: bytes
    place: Place = WHOLE
    opacity: float = 1


@dataclass(frozen=True)
class Picture:
    """Layers, the lowest first, with the boxes drawn over them. What a box of CROP leaves outside is dimmed."""

    layers: tuple[Layer, ...]  # none: no picture; `words` says why
    width: int
    height: int
    words: str  # text for readers who do not see the picture
    boxes: tuple[DrawnBox, ...] = ()
    caption: str = ""


@dataclass(frozen=True)
class View:
    """The pictures and facts of one image in one run."""

    pictures: Sequence[Picture]
    facts: Sequence[tuple[str, str]]
    trouble: str = ""  # why something is missing


@dataclass(frozen=True)
class Card:
    """One image."""

    key: str
    shard: str
    status: str
    views: Sequence[View]
    values: dict[str, Number] = field(default_factory=dict)  # values that the reader can sort by


@dataclass(frozen=True)
class Order:
    """How the reader's first press sorts the cards by a value, and what it is."""

    falling: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    value: Number = None  # that the reader can sort by
    best: bool = False  # of its column


@dataclass(frozen=True)
class Table:
    """A table above the cards; the first cell of a row is its name."""

    heads: Sequence[str]
    hints: Sequence[str]  # one line on each column
    rows: Sequence[Sequence[Cell]]


def render(
    title: str,
    facts: Iterable[tuple[str, str]],
    notes: Iterable[str],
    cards: Sequence[Card],
    table: Table | None = None,
    orders: Mapping[str, Order] | None = None,
) -> str:
    """Return the page. The template escapes all text.

    Args:
        title, facts, notes: of the header.
        cards: in their first order.
        table: above the cards.
        orders: of the cards' values; those without one rise.
    """
    names = dict.fromkeys(name for card in cards for name in card.values)
    return _template().render(
        title=title,
        table=table,
        run_facts=facts,
        notes=notes,
        cards=cards,
        sorts=[(name, (orders or {}).get(name, Order())) for name in names],
        at={name: at for at, name in enumerate(names)},
        ids=_Ids(),
        statuses=sorted({card.status for card in cards}),
        ok=OK,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=_visible,
    )
    environment.filters |= {"base64": _base64, "digest": _digest}
    return environment.get_template("page.html")


def _visible(value: object) -> object:
    """Return text with control and bidi characters escaped."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


class _Ids:
    """Numbers layers by identity, so that a page stores each once."""

    def __init__(self) -> None:
        self._ids: dict[Layer, int] = {}

    def number(self, layer: Layer) -> tuple[int, bool]:
        """Return the layer's number, and whether it is drawn for the first time."""
        new = layer not in self._ids
        return self._ids.setdefault(layer, len(self._ids)), new


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _digest(script: str) -> str:
    """Return the hash that lets the page's content security policy accept its own script."""
    return _base64(hashlib.sha256(script.encode()).digest())
