"""A card's pictures: the map over the photograph, what the mask shows, hides and has inpainted, each stored once."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_run import SIZE, Made, make_run
from making import write_tar
from numpy.typing import NDArray
from pages import Card, page_of
from scipy import ndimage

from saltern.pipeline.runs.reader import Row, map_in_original, open_run
from saltern.pipeline.shards.samples import read_samples
from saltern.pipeline.show.sheet import contact_sheet
from saltern.schemas.run import Shard
from saltern.schemas.seal import seal


def _compare(made: Made, check: Callable[[Card, Row, NDArray[np.float32]], None]) -> None:
    for card, row in zip(page_of(made).cards, open_run(str(made.path)), strict=True):
        assert card.pixels(0).shape == (*SIZE, 3)  # an original smaller than a thumbnail is not enlarged
        check(card, row, map_in_original(row))


def test_the_map_lies_over_the_photograph(tmp_path: Path) -> None:
    def check(card: Card, row: Row, map_YX: NDArray[np.float32]) -> None:
        photo, heat = card.pixels(0).astype(float), card.pixels(1).astype(float)
        seen = np.isfinite(map_YX)
        inside, outside = (ndimage.binary_erosion(part, iterations=2) for part in (seen, ~seen))
        assert np.abs(heat - 0.3 * photo)[outside].mean() < 1  # dimmed
        colours = ((heat - 0.4 * photo) @ [0.299, 0.587, 0.114])[inside]
        drawn = map_YX.clip(min=0)  # a signed map is coloured from 0 up
        assert np.corrcoef(colours, drawn[inside])[0, 1] > 0.95  # inferno grows brighter from end to end

    _compare(make_run(tmp_path, shards=1), check)


def test_the_masks_pictures_show_hide_and_inpaint_its_part(tmp_path: Path) -> None:
    def check(card: Card, row: Row, map_YX: NDArray[np.float32]) -> None:
        photo, shown, left, filled = (card.pixels(number).astype(float) for number in (0, 2, 3, 4))
        seen = np.isfinite(map_YX)
        mask = np.nan_to_num(map_YX, nan=-9) >= row.mask_threshold
        inside = ndimage.binary_erosion(mask, iterations=2)
        rest = ndimage.binary_erosion(seen & ~mask, iterations=2)
        beyond = ndimage.binary_erosion(~seen, iterations=2)
        assert inside.sum() > 20
        assert rest.sum() > 20
        for pixels, kept, gone in ((shown, inside, rest), (left, rest, inside)):
            assert (pixels[kept] == photo[kept]).all()
            assert not pixels[gone].any()
        assert (filled[rest] == photo[rest]).all()
        assert np.abs(filled - photo)[inside].mean() > 5
        for pixels in (shown, left, filled):
            assert np.abs(pixels - 0.3 * photo)[beyond].mean() < 1
        # Only what the network saw is inpainted from, by Telea's method with radius 3.
        crop = np.ix_(seen.any(1), seen.any(0))
        bits = (np.asarray(card.layers[4][1].pixels)[..., 3] > 0).astype(np.uint8)
        expected = cv2.inpaint(np.ascontiguousarray(card.pixels(0)[crop]), bits[crop], 3, cv2.INPAINT_TELEA)
        assert np.abs(filled[crop] - expected)[inside[crop]].mean() < 12  # WebP's error, and of the photograph

    _compare(make_run(tmp_path, shards=1), check)


def test_a_card_stores_its_photograph_once(tmp_path: Path) -> None:
    card = page_of(make_run(tmp_path, shards=1, samples=1)).cards[0]
    photographs = [layers[0].pixels for layers in card.layers]
    assert len(photographs) == 5
    assert all(one is photographs[0] for one in photographs)
    text = contact_sheet(open_run(str(tmp_path / "run")))
    assert text.count("<image ") == 5  # the photograph, the map, two masks and the inpainted part
    assert text.count("<use ") == 4


def test_images_of_the_cards_below_wait_until_they_are_seen(tmp_path: Path) -> None:
    text = contact_sheet(open_run(str(make_run(tmp_path, shards=1, samples=1).path)))
    assert "article{content-visibility:auto;contain-intrinsic-size:auto" in text
    assert text.count('decoding="async"') == text.count("<image ")


@pytest.mark.parametrize("grid", [(7, 7), (32, 32)])
def test_a_card_of_a_photograph_is_small(shared_data: Path, tmp_path: Path, grid: tuple[int, int]) -> None:
    """1,000 photographs with maps and masks of noise stay below 60 MB: three JPEG pictures of each were 100 MB."""
    tar = next(iter(sorted((shared_data / "imagenet-sample").glob("*.tar"))))
    made = make_run(tmp_path, shards=1, samples=12, grid=grid)
    photographs = enumerate(read_photographs(tar, 12))
    write_tar(Path(made.run.shards[0].url), [(f"s0k{index}", {"jpg": photo}) for index, photo in photographs])
    text = contact_sheet(open_run(str(resized(made).path)))
    assert "cannot be read" not in text
    assert 5_000 < len(text) / 12 < 60_000


def read_photographs(tar: Path, count: int) -> list[bytes]:
    found = read_samples(Shard("x", str(tar), tar.stat().st_size, take=count))
    return [sample.image for sample in found if sample.image]


def resized(made: Made) -> Made:
    """Write the tar's present size into run.json and the receipt."""
    old, new = made.run.shards[0].size, Path(made.run.shards[0].url).stat().st_size
    for name in ("run.json", "receipts/part0/train.json"):
        file = made.path / name
        stored = json.loads(file.read_text().replace(f'"size": {old}', f'"size": {new}'))
        del stored["seal"]
        file.write_bytes(seal(stored))
    return made
