"""The contact sheet is complete, needs no other file, and draws maps, masks and boxes in their places."""

import base64
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from made_run import make_run, write_shard
from making import picture, write_tar
from pages import Page, members, page_of

from saltern.pipeline.runs.reader import COLUMNS, open_run
from saltern.pipeline.show.sheet import comparison, contact_sheet
from saltern.schemas.errors import UserError
from saltern.schemas.saliency import DECODE_FAILED

EVIL = '<b onload="x">\'&amp; evil'


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=members())
    text = contact_sheet(open_run(str(made.path)))
    page = Page(text)
    assert not page.tags & {"link", "iframe", "object", "embed", "base", "form", "audio", "video"}
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "style", "xlink:href")
        assert not name.startswith("on")
        inside = {"image": "data:image/webp;base64,", "use": "#i"}
        assert name != "href" or str(value).startswith(inside[tag])
    assert not re.search(r"url\(|@import|https?:|fetch\(|import\(|eval\(", text)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    policy = next(
        value for tag, name, value in page.attributes if tag == "meta" and str(value).startswith("default-src")
    )
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_very_tall_image_does_not_fill_the_page(tmp_path: Path) -> None:
    """The browser would stretch a thumbnail of 1 x 320 pixels to the width of a card."""
    text = contact_sheet(open_run(str(make_run(tmp_path, shards=1, samples=1).path)))
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    rules = dict(re.findall(r"([^{}]+)\{([^{}]*)\}", style))
    assert re.search(r"max-height:\d+rem", rules["\n.picture svg"])


def test_signed_maps_are_explained_only_where_there_are_some(tmp_path: Path) -> None:
    """The maps of made_run are drawn from -1 to 2, those of uint8 are stored with their range."""
    made = make_run(tmp_path / "signed", shards=1, samples=1)
    note = "Signed maps are coloured from 0 up."
    assert note in contact_sheet(open_run(str(made.path)))
    (row,) = open_run(str(made.path))
    record = {name: getattr(row, name) for name in COLUMNS if name not in ("map", "mask")}
    record |= {"map": np.abs(row.map()).tobytes(), "mask": row.mask_bytes}
    write_shard(made, 0, 1, [record], (4, 4))
    unsigned = open_run(str(made.path))
    assert note not in contact_sheet(unsigned)
    other = open_run(str(make_run(tmp_path / "other", shards=1, samples=1).path))
    assert note in comparison([unsigned, other])


def test_the_header_says_where_the_maps_come_from(tmp_path: Path) -> None:
    made = make_run(tmp_path, broken=((0, 1),), options={"eps": 0.5}, discretize="otsu")
    page = page_of(made, limit=4)
    for words in ["grad-cam of resnet18", "eps=0.5", "layer4", "otsu", "shorter side 40, crop 32", made.run.fingerprint,
                  "1 decode_failed, 14 ok", "3 of 3 done", "4 of 15 rows, in shard order"]:  # fmt: skip
        assert words in page.head


def test_cards_come_in_shard_order_with_the_row_s_facts(tmp_path: Path) -> None:
    made = make_run(tmp_path, targets=2, json=members())
    page = page_of(made, limit=13)
    rows = list(open_run(str(made.path)))[:13]
    assert [card.key for card in page.cards] == [row.key for row in rows]
    for card, row in zip(page.cards, rows, strict=True):
        assert f"{row.score:.3f}" in card.text
        assert f"{100 * row.mask_area:.1f} %" in card.text
        assert " ".join(map(str, row.boxes[0])) in card.text
        assert f"label {row.label} disc" in " ".join(card.text.split())
        assert [str(image["alt"]).split()[0] for image in card.images] == [
            f"{row.key},",
            "map",
            "mask",
            row.key,
            row.key,
        ]


@pytest.mark.parametrize("column", ["score", "mask_area", "predicted"])
def test_sorted_by_a_column_lowest_first_and_rows_without_one_last(tmp_path: Path, column: str) -> None:
    made = make_run(tmp_path, samples=3, broken=((1, 0),))
    rows = [row for row in open_run(str(made.path)) if row.status == "ok"]
    expected = [row.key for row in sorted(rows, key=lambda row: getattr(row, column))]
    page = page_of(made, column)
    assert [card.key for card in page.cards] == [*expected, "s1k0"]
    assert f"sorted by {column}, lowest first" in page.head
    assert [card.key for card in page_of(made, column, limit=3).cards] == expected[:3]


def test_sorted_by_status_failed_rows_come_first(tmp_path: Path) -> None:
    made = make_run(tmp_path, broken=((1, 2), (2, 0)))
    page = page_of(made, "status", limit=4)
    assert [card.key for card in page.cards] == ["s1k2", "s2k0", "s0k0", "s0k1"]
    assert [card.attributes["data-status"] for card in page.cards] == [DECODE_FAILED, DECODE_FAILED, "ok", "ok"]
    assert "no image" in page.cards[0].text
    assert page.cards[0].images == []


@pytest.mark.parametrize("column", ["nosuch", "boxes", "map", "key"])
def test_a_column_without_an_order_lists_those_that_have_one(tmp_path: Path, column: str) -> None:
    run = open_run(str(make_run(tmp_path, shards=1, samples=1).path))
    with pytest.raises(UserError, match=f"--sort '{column}' .*mask_area.*score.*status"):
        contact_sheet(run, column)


def test_what_comes_from_the_data_is_escaped(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=2, json=members(name=EVIL), class_names=[EVIL] * 10, method=EVIL)
    shard = made.run.shards[0]
    failed = {"key": EVIL, "shard": shard.name, "label": 1, "status": EVIL, "error": EVIL}
    rows = [{**failed, "index": index} for index in range(2)]
    write_shard(made, 0, 2, rows, (4, 4))
    page = page_of(made)
    assert "b" not in page.tags
    assert page.cards[0].key == EVIL
    assert page.cards[0].attributes["data-status"] == EVIL
    assert page.cards[0].text.count(EVIL) >= 3  # key, status, reason
    assert [image["alt"] for image in page.cards[2].images][:2] == [f"s1k0, 0 {EVIL}", f"map of s1k0 for 0 {EVIL}"]
    assert f"{EVIL} of resnet18" in page.head


def test_shards_that_are_gone_leave_maps_without_images(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=2)
    Path(made.run.shards[1].url).unlink()
    page = page_of(made)
    assert "part1/train: shown without its images" in page.head
    assert "part0/train: " not in page.head
    for card in page.cards[2:]:
        assert "the image cannot be read" in card.text
        assert len(card.images) == 4  # no pixels to inpaint from
        assert np.abs(card.pixels(0).astype(int) - 128).max() < 3  # grey
        assert np.ptp(card.pixels(1).astype(int)) > 50


def test_a_tar_of_other_samples_is_not_shown(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=2)
    tar = Path(made.run.shards[0].url)
    write_tar(tar, [(key, {"jpg": picture(0), "cls": b"0"}) for key in ("s0k0", "other")])
    page = page_of(made)
    assert "it has 'other' instead of the run's 's0k1'" in page.head
    assert [("the image cannot be read" in card.text) for card in page.cards] == [False, True]


def test_only_the_shards_that_are_shown_are_read(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    for shard in made.run.shards[1:]:
        Path(shard.url).unlink()
    page = page_of(made, limit=5)
    assert "cannot be read" not in page.head
    assert all(len(card.images) == 5 for card in page.cards)


def test_boxes_found_and_given_are_drawn_in_their_places(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=members())
    for card, row in zip(page_of(made).cards, open_run(str(made.path)), strict=True):
        for number in (0, 2):
            assert card.boxes(number, "given")[0] == pytest.approx([3, 4, 31, 41], abs=0.1)
            assert card.boxes(number, "found")[0] == pytest.approx(row.boxes[0], abs=0.1)
        scale_x, scale_y, x, y = row.geometry
        for number in range(1, 5):
            seen = [x, y, x + 32 * scale_x, y + 32 * scale_y]
            assert card.boxes(number, "crop")[0] == pytest.approx(seen, abs=0.1)


@pytest.mark.parametrize("boxes", ["none", [[1, 2]], [["a"] * 4], {"x": 1}, None])
def test_given_boxes_of_another_kind_are_left_out(tmp_path: Path, boxes: object) -> None:
    made = make_run(tmp_path, shards=1, samples=1, json=members(boxes=boxes))
    assert page_of(made).cards[0].boxes(0, "given") == []


@pytest.mark.parametrize("raw", [b"[1]", b"{", b"\xff\xfe"])
def test_json_of_another_kind_is_left_out(tmp_path: Path, raw: bytes) -> None:
    assert len(page_of(make_run(tmp_path, shards=1, samples=1, json=raw)).cards[0].images) == 5


def test_a_run_without_maps_shows_masks(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, shards=1, samples=1, save_map=False))
    assert [str(image["alt"]).split()[0] for image in page.cards[0].images] == ["s0k0,", "mask", "s0k0", "s0k0"]
    assert "not stored" in page.head


def test_a_run_with_nothing_done(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    (made.path / "receipts/part0/train.json").unlink()
    for sort in (None, "score"):
        page = page_of(made, sort)
        assert page.cards == []
        assert "0 of 1 done" in page.head
