"""An image that does not fit in memory alone is a row with this status; the images next to it are done."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from extracting import extract
from images import encoded
from making import HELPERS, picture, write_tar
from PIL.PngImagePlugin import PngImageFile

from saltern.pipeline.shards.decode import DecodeError, decode
from saltern.schemas.config import Preprocess
from saltern.schemas.saliency import OUT_OF_MEMORY

BLACK = encoded(np.zeros((50, 50, 3), np.uint8))
SETTINGS = {"layer": None, "target": "top1", "batch_size": 4}


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def results(out: Path, column: str) -> list[str]:
    (file,) = out.glob("data/*.parquet")
    found: list[str] = pq.read_table(file)[column].to_pylist()
    return found


def test_an_image_that_exhausts_the_device_costs_its_own_row_only(tmp_path: Path) -> None:
    images = [picture(1), BLACK, picture(2), picture(3), b"no image", picture(4), BLACK]
    shard = write_tar(tmp_path / "in.tar", [(f"s{i}", {"jpg": image}) for i, image in enumerate(images)])
    assert extract(shard, tmp_path / "run", method="odd_methods:Greedy", **SETTINGS) == 0
    assert extract(shard, tmp_path / "mean", method="odd_methods:Mean", **SETTINGS) == 0
    expected = ["ok", OUT_OF_MEMORY, "ok", "ok", "decode_failed", "ok", OUT_OF_MEMORY]
    assert results(tmp_path / "run", "status") == expected
    assert results(tmp_path / "run", "error")[1] == "one image of 32 x 32 does not fit in the memory of cpu"
    pairs = zip(results(tmp_path / "run", "mask"), results(tmp_path / "mean", "mask"), strict=True)
    assert [a == b for a, b in pairs] == [True, False, True, True, True, True, False]


def test_a_shard_of_such_images_has_a_row_for_each(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "in.tar", [(f"s{i}", {"png": BLACK}) for i in range(3)])
    extract(shard, tmp_path / "run", method="odd_methods:Greedy", **SETTINGS)
    assert results(tmp_path / "run", "status") == [OUT_OF_MEMORY] * 3


@pytest.mark.parametrize("step", ["load", "crop"])
def test_a_decoder_without_memory_does_not_call_a_good_image_damaged(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    image = picture(1)
    monkeypatch.setattr("PIL.Image.Image." + step, refuse)
    monkeypatch.setattr("PIL.ImageFile.ImageFile." + step, refuse)
    with pytest.raises(DecodeError) as error:
        decode(image, Preprocess(40, 32))
    assert error.value.status == OUT_OF_MEMORY


@pytest.mark.parametrize(("refusals", "status"), [(1, "ok"), (2, OUT_OF_MEMORY)])
def test_an_image_is_decoded_a_second_time_when_others_may_have_taken_the_memory(
    refusals: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [refusals]
    load = PngImageFile.load

    def load_or_refuse(image: PngImageFile) -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise MemoryError
        return load(image)

    shard = write_tar(tmp_path / "in.tar", [("s", {"png": picture(1, kind="PNG")})])
    monkeypatch.setattr(PngImageFile, "load", load_or_refuse)
    extract(shard, tmp_path / "run", method="odd_methods:Mean", **SETTINGS)
    assert results(tmp_path / "run", "status") == [status]


def test_an_image_that_cannot_be_turned_upright_for_lack_of_memory_is_not_stored_askew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", refuse)
    with pytest.raises(DecodeError) as error:
        decode(picture(1), Preprocess(40, 32))
    assert error.value.status == OUT_OF_MEMORY
