"""HTML pages as a browser reads them."""

import base64
import io
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from made_run import Made
from numpy.typing import NDArray
from PIL import Image

from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.show.sheet import contact_sheet

VOID = {"meta", "img", "input", "rect", "br"}


@dataclass
class Card:
    attributes: dict[str, str | None]
    key: str = ""
    text: str = ""
    images: list[dict[str, str | None]] = field(default_factory=list)
    rectangles: list[list[dict[str, str | None]]] = field(default_factory=list)  # for each image

    def pixels(self, number: int) -> NDArray[np.uint8]:
        source = self.images[number]["src"]
        assert source is not None
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))))

    def boxes(self, number: int, kind: str) -> list[list[float]]:
        """Return the boxes of a kind, x0 y0 x1 y1 in pixels of the picture."""
        found = [r for r in self.rectangles[number] if r["class"] == kind]
        ends = [[float(r[name] or 0) for name in ("x", "y", "width", "height")] for r in found]
        return [[x, y, x + width, y + height] for x, y, width, height in ends]


class Page(HTMLParser):
    """A parsed page. Its tags must be balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.cards: list[Card] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.head = ""
        self.script = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        given = dict(attrs)
        if tag == "article":
            self.cards.append(Card(given))
        elif tag == "img":
            self.cards[-1].images.append(given)
            self.cards[-1].rectangles.append([])
        elif tag == "rect":
            self.cards[-1].rectangles[-1].append(given)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "article" in self._open:
            card = self.cards[-1]
            card.key = card.key or data.strip()
            card.text += data + " "
        elif "header" in self._open:
            self.head += data + " "
        elif "script" in self._open:
            self.script += data


def page_of(made: Made, sort: str | None = None, limit: int = 48) -> Page:
    return Page(contact_sheet(open_run(str(made.path)), sort, limit))


def members(**changes: object) -> bytes:
    return json.dumps({"name": "disc", "boxes": [[3, 4, 30, 40]], **changes}).encode()
