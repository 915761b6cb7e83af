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

VOID = {"meta", "img", "input", "rect", "path", "image", "use", "br"}


@dataclass
class Layer:
    """An image of a picture, with its place in the picture's pixels."""

    pixels: Image.Image
    place: list[float]  # x, y, width, height
    opacity: float


@dataclass
class Card:
    attributes: dict[str, str | None]
    key: str = ""
    text: str = ""
    images: list[dict[str, str | None]] = field(default_factory=list)  # the attributes of each picture
    layers: list[list[Layer]] = field(default_factory=list)  # of each picture, the lowest first
    rectangles: list[list[dict[str, str | None]]] = field(default_factory=list)  # for each image

    def pixels(self, number: int) -> NDArray[np.uint8]:
        """Return a picture as a browser draws it, without its boxes."""
        size = self._size(number)
        drawn = Image.new("RGB", size)
        for layer in self.layers[number]:
            x, y, width, height = layer.place
            scale_x, scale_y = layer.pixels.width / width, layer.pixels.height / height
            matrix = (scale_x, 0, -x * scale_x, 0, scale_y, -y * scale_y)
            over = layer.pixels.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            alpha = np.asarray(over.getchannel("A")) * layer.opacity
            drawn.paste(over.convert("RGB"), mask=Image.fromarray(alpha.round().astype(np.uint8)))
        pixels = np.array(drawn)
        for x0, y0, x1, y1 in np.array(self.boxes(number, "crop")).round().astype(int):
            inside = np.zeros(pixels.shape[:2], bool)
            inside[max(0, y0) : y1, max(0, x0) : x1] = True
            pixels[~inside] = (0.3 * pixels[~inside]).round()
        return pixels

    def _size(self, number: int) -> tuple[int, int]:
        width, height = str(self.images[number]["viewbox"]).split()[2:]
        return int(width), int(height)

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
        self._opacity = 1.0
        self._stored: dict[str, tuple[Image.Image, list[float]]] = {}  # by reference
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
        elif tag == "svg":
            self.cards[-1].images.append({**given, "alt": given["aria-label"]})
            self.cards[-1].rectangles.append([])
            self.cards[-1].layers.append([])
        elif tag == "g":
            self._opacity = float(given["opacity"] or 1)
        elif tag in ("image", "use"):
            if tag == "image":
                raw = base64.b64decode(str(given["href"]).removeprefix("data:image/webp;base64,"))
                place = [float(given[name] or 0) for name in ("x", "y", "width", "height")]
                self._stored[f"#{given['id']}"] = Image.open(io.BytesIO(raw)).convert("RGBA"), place
            pixels, place = self._stored[f"#{given['id']}" if tag == "image" else str(given["href"])]
            self.cards[-1].layers[-1].append(Layer(pixels, place, self._opacity))
        elif tag == "rect":
            self.cards[-1].rectangles[-1].append(given)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "g":
            self._opacity = 1.0

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
