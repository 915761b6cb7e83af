"""One self-contained HTML page of cards: nothing is fetched, and without its script it is whole all the same.

A card is an image; under it stands a view for each run that explained it.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from saltern.schemas.saliency import OK

Number = int | float | None
FOUND, GIVEN, CROP = "found", "given", "crop"  # kinds of boxes


@dataclass(frozen=True)
class DrawnBox:
    """In shares of the picture's width and height, [0, 1]."""

    kind: str  # FOUND | GIVEN | CROP
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Picture:
    """A JPEG with the boxes that are drawn over it."""

    jpeg: bytes  # empty: there is none, and the words say why
    width: int
    height: int
    words: str  # what a reader who does not see it should know
    boxes: tuple[DrawnBox, ...] = ()
    caption: str = ""


@dataclass(frozen=True)
class View:
    """What was found in an image."""

    pictures: Sequence[Picture]
    facts: Sequence[tuple[str, str]]
    trouble: str = ""  # why something is absent


@dataclass(frozen=True)
class Card:
    """One image."""

    key: str
    shard: str
    status: str
    views: Sequence[View]
    values: dict[str, Number] = field(default_factory=dict)  # what the page can be sorted by


def render(title: str, facts: Iterable[tuple[str, str]], notes: Iterable[str], cards: Sequence[Card]) -> str:
    """The page. All that it is given is text, and is escaped here."""
    facts_ = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    notes_ = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<header><h1>{escape(title)}</h1><dl class=run>{facts_}</dl>{notes_}{_LEGEND}{_tools(cards)}</header>\n"
        f"<main>{''.join(map(_card, cards))}</main>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _tools(cards: Sequence[Card]) -> str:
    """Sorting and filtering; the script unhides what would do nothing without it."""
    names = ["page order", *(cards[0].values if cards else ())]
    sorts = "".join(f'<button type=button data-by="{escape(name)}">{escape(name)}</button>' for name in names)
    statuses = sorted({card.status for card in cards})
    filters = "".join(
        f'<label><input type=checkbox checked value="{escape(status)}"> {escape(status)}</label>'
        for status in statuses
        if len(statuses) > 1
    )
    return f"<div class=tools hidden><div role=group aria-label=Sort>sort: {sorts}</div><div>{filters}</div></div>"


def _card(card: Card) -> str:
    values = "".join(
        f' data-{escape(name.replace("_", "-"))}="{value:.6g}"'
        for name, value in card.values.items()
        if value is not None
    )
    failed = "" if card.status == OK else f"<span class=status>{escape(card.status)}</span>"
    return (
        f'<article data-status="{escape(card.status)}"{values}>'
        f"<h2>{escape(card.key)}{failed}<small>{escape(card.shard)}</small></h2>"
        f"{''.join(map(_view, card.views))}</article>\n"
    )


def _view(view: View) -> str:
    pictures = "".join(map(_picture, view.pictures))
    trouble = f"<p class=trouble>{escape(view.trouble)}</p>" if view.trouble else ""
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in view.facts)
    many = " many" if any(picture.caption for picture in view.pictures) else ""
    return f'<div class="pictures{many}">{pictures}</div>{trouble}<dl>{facts}</dl>'


def _picture(picture: Picture) -> str:
    width, height = picture.width, picture.height
    caption = f"<p>{escape(picture.caption)}</p>" if picture.caption else ""
    if not picture.jpeg:
        gap = f"<div class=gap>{escape(picture.words)}</div>"
        return f"<div class=picture>{gap}{caption}</div>"
    data = base64.b64encode(picture.jpeg).decode()
    boxes = "".join(_rectangle(box, width, height) for box in picture.boxes)
    drawn = f'<svg viewBox="0 0 {width} {height}" aria-hidden=true>{boxes}</svg>' if boxes else ""
    return (
        f'<div class=picture><img src="data:image/jpeg;base64,{data}" width={width} height={height} '
        f'alt="{escape(picture.words)}">{drawn}{caption}</div>'
    )


def _rectangle(box: DrawnBox, width: int, height: int) -> str:
    place = (
        f'x="{box.x0 * width:.1f}" y="{box.y0 * height:.1f}" '
        f'width="{(box.x1 - box.x0) * width:.1f}" height="{(box.y1 - box.y0) * height:.1f}"'
    )
    return f'<rect class=casing {place} /><rect class="{box.kind}" {place} />'


_LEGEND = (
    "<p class=legend><span class=found></span>box of the mask <span class=given></span>given box "
    "<span class=crop></span>what the network saw</p>"
)

_STYLE = """
:root{color-scheme:light dark;--back:#f6f6f4;--card:#fff;--text:#1b1c1d;--dim:#63666a;--line:#dcdcd8;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--back:#141517;--card:#1f2124;--text:#ececec;--dim:#9da1a6;--line:#34373b;
--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:120rem;padding:1rem;background:var(--back);color:var(--text);
font:14px/1.45 system-ui,sans-serif}
h1{font-size:1.3rem;margin:0 0 .6rem}
dl{margin:0;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem}dl div{display:flex;gap:.35rem;min-width:0}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.run{max-width:75rem}.note{margin:.5rem 0 0}.legend{color:var(--dim);margin:.5rem 0}
.legend span{display:inline-block;width:1.1em;height:.8em;margin:0 .4em 0 1em;background:#333}
.legend span:first-child{margin-left:0}
.legend .found{border:2px solid #2de2ff}.legend .given{border:2px dashed #ffd60a}.legend .crop{border:1px dotted #fff}
.tools{display:flex;flex-wrap:wrap;gap:.4rem 1.5rem;margin:.6rem 0}.tools[hidden]{display:none}
button{font:inherit;padding:.1rem .55rem;margin-right:.25rem;border:1px solid var(--line);border-radius:4px;
background:var(--card);color:var(--text);cursor:pointer}button[aria-pressed=true]{border-color:currentColor}
label{margin-right:.8rem}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,36rem),1fr));gap:.8rem;margin-top:.8rem}
article{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem;min-width:0}
article[hidden]{display:none}
h2{font-size:1rem;margin:0 0 .4rem;overflow-wrap:anywhere}
h2 small{font-weight:400;color:var(--dim);margin-left:.6rem}
.status{color:var(--bad);margin-left:.6rem}.trouble{color:var(--bad);margin:.2rem 0 .4rem;overflow-wrap:anywhere}
.pictures{display:grid;grid-template-columns:repeat(3,1fr);gap:.4rem;margin-bottom:.4rem;align-items:start}
.many{grid-template-columns:repeat(auto-fill,minmax(9rem,1fr))}article:has(.many){grid-column:1/-1}
.picture p{margin:.1rem 0 0;color:var(--dim);overflow-wrap:anywhere;line-height:1.25}
.gap{display:grid;place-content:center;min-height:6rem;padding:.4rem;border:1px dashed var(--line);color:var(--bad);
text-align:center;overflow-wrap:anywhere}
.picture{position:relative}.picture img{display:block;width:100%;height:auto;border-radius:3px}
.picture svg{position:absolute;inset:0 0 auto 0;width:100%;height:auto;overflow:visible}
rect{fill:none;vector-effect:non-scaling-stroke}
rect.casing{stroke:#000;stroke-opacity:.55;stroke-width:4}rect.found{stroke:#2de2ff;stroke-width:2}
rect.given{stroke:#ffd60a;stroke-width:2;stroke-dasharray:6 4}
rect.crop{stroke:#fff;stroke-width:1;stroke-dasharray:2 3}
"""

_SCRIPT = """
'use strict';
const main = document.querySelector('main'), cards = [...main.children], tools = document.querySelector('.tools');
const value = (card, by) => card.getAttribute('data-' + by.replaceAll('_', '-'));
let last = 'page order', sign = 1;
const buttons = [...tools.querySelectorAll('button')];
const press = () => buttons.forEach(b => b.setAttribute('aria-pressed', b.dataset.by === last));
buttons.forEach(button => button.addEventListener('click', () => {
  const by = button.dataset.by;
  sign = by === last ? -sign : 1;
  last = by;
  const order = card => cards.indexOf(card);
  const sorted = [...cards].sort((a, b) => {
    const x = value(a, by), y = value(b, by);
    if (x === null || y === null) return (x === null) - (y === null) || sign * (order(a) - order(b));
    return sign * (x - y) || order(a) - order(b);
  });
  main.append(...sorted);
  press();
}));
const boxes = [...tools.querySelectorAll('input')];
boxes.forEach(box => box.addEventListener('change', () => {
  const shown = new Set(boxes.filter(b => b.checked).map(b => b.value));
  cards.forEach(card => { card.hidden = !shown.has(card.dataset.status); });
}));
press();
tools.hidden = false;
"""
