"""Inputs that are not square: decoding, geometry, maps, masks, boxes, and what reads them."""

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call
from extracting import REQUEST, extract
from making import Tiny, picture, write_tar
from naive_metrics import inclusive
from PIL import Image

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.leaderboard.board import make_leaderboard
from saltern.pipeline.maps.frame import to_original
from saltern.pipeline.methods import available, build
from saltern.pipeline.metrics.evaluate import EvaluateRequest
from saltern.pipeline.metrics.families import FAMILIES
from saltern.pipeline.models.classifiers import load
from saltern.pipeline.models.grids import check_layers
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.reader import map_in_original, open_run
from saltern.pipeline.runs.verify import verify
from saltern.pipeline.shards.decode import decode, from_pixels, geometry_of
from saltern.pipeline.shards.resample import resample
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import square_of, to_side

CROP = (32, 48)


def covering(width: int, height: int, preprocess: Preprocess) -> tuple[int, int]:
    """Return height and width of an image that covers the frame: the larger of the two scales, side by side."""
    short, (rows, columns) = min(preprocess.shape), preprocess.shape
    frame = round(preprocess.resize * rows / short), round(preprocess.resize * columns / short)
    scale_by_height = [frame[0], frame[0] * width // height]
    scale_by_width = [frame[1] * height // width, frame[1]]
    return tuple(scale_by_height if scale_by_height[1] >= frame[1] else scale_by_width)


@pytest.mark.slow  # imports torchvision
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [(32, 64), (64, 32), (50, 51)])
def test_pixels_are_those_of_torchvision_on_the_image_that_covers_the_crop(
    crop: tuple[int, int], interpolation: str
) -> None:
    import torchvision.transforms.functional as T
    from torchvision.transforms import InterpolationMode

    for width, height in ((120, 90), (90, 120), (200, 100), (333, 77), (77, 333)):
        image_HWC = np.array(Image.open(io.BytesIO(picture(width, height, width, "PNG"))))
        preprocess = Preprocess(resize=min(crop) + 8, crop=crop, interpolation=interpolation)
        size = covering(width, height, preprocess)
        resized = T.resize(Image.fromarray(image_HWC), list(size), InterpolationMode(interpolation))
        expected_HWC = np.asarray(T.center_crop(resized, list(crop))).astype(int)
        found = from_pixels(image_HWC, preprocess)
        assert found.pixels_HWC.shape == (*crop, 3)
        off = np.abs(found.pixels_HWC - expected_HWC)
        # Pillow may swap its two passes for a part of the image, which rounds otherwise.
        assert off.max() <= 3
        assert off.mean() < 0.3
        planar = torch.from_numpy(image_HWC).permute(2, 0, 1).contiguous()
        on_device = resample([planar], [geometry_of(width, height, preprocess)], preprocess)[0].numpy()
        assert np.abs(on_device.astype(int) - found.pixels_HWC).max() <= 3


def test_a_square_is_resized_and_cropped_as_before() -> None:
    """The rule for one shorter side, written down again."""
    draw = random.Random(0)
    for _ in range(300):
        width, height, crop = draw.randint(1, 900), draw.randint(1, 900), draw.randint(1, 300)
        resize, short = crop + draw.randint(0, 40), min(width, height)
        new = [resize if side == short else int(resize * side / short) for side in (width, height)]
        scales = width / new[0], height / new[1]
        offsets = [round((side - crop) / 2.0) * scale for side, scale in zip(new, scales, strict=True)]
        assert geometry_of(width, height, Preprocess(resize, crop)) == (*scales, *offsets)
    assert Preprocess(crop=(224, 224)) == Preprocess(crop=224)


@pytest.mark.parametrize("squash", [False, True])
def test_a_rectangle_lies_where_it_was_drawn(squash: bool) -> None:
    for height, width in ((90, 200), (200, 90)):
        image_HWC = np.zeros((height, width, 3), np.uint8)
        box = width // 2 - 9, height // 2 - 12, width // 2 + 8, height // 2 + 15
        image_HWC[box[1] : box[3], box[0] : box[2]] = 255
        found = from_pixels(image_HWC, Preprocess(resize=80, crop=(64, 96), squash=squash))
        ys, xs = np.nonzero(found.pixels_HWC[..., 0] > 127)
        seen = np.array([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]])
        there = to_original(seen, np.array([found.geometry]), np.array([[height, width]], np.int32))[0]
        assert np.abs(there - box).max() <= max(found.geometry[:2])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    mask_YX, encoded = np.zeros((44, 60), np.uint8), io.BytesIO()
    mask_YX[5:40, 5:40] = 255
    Image.fromarray(mask_YX).save(encoded, "PNG")
    common = {"json": inclusive((5, 5, 40, 40)), "mask.png": encoded.getvalue()}
    members = [(f"k{at}", {"jpg": picture(at, 44, 60), "cls": f"{at}", **common}) for at in range(3)]
    return write_tar(tmp_path / "in" / "a.tar", members)


def test_a_run_stores_maps_masks_and_boxes_of_its_shape(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert extract(shards, out, crop=CROP, target="label") == 0
    store, run = load_run_folder(str(out))
    assert run.config.preprocess.crop == CROP
    assert run.config.to_dict()["crop"] == [32, 48]
    assert verify(store, run).findings == []
    assert extract(shards, out, crop=list(CROP), target="label") == 0  # the same run
    method = build("grad-cam", load("making:tiny", side=CROP).model, layer="body", input_side=CROP)
    for at, row in enumerate(open_run(str(out))):
        decoded = decode(picture(at, 44, 60), run.config.preprocess)
        assert decoded.pixels_HWC.shape == (*CROP, 3)
        assert row.geometry == pytest.approx(list(decoded.geometry))
        how = run.config.preprocess
        x_HWC = (decoded.pixels_HWC / 255 - np.array(how.mean)) / np.array(how.std)
        map_hw = method(torch.tensor(x_HWC, dtype=torch.float32).permute(2, 0, 1)[None], torch.tensor([at]))[0]
        assert row.map().shape == (4, 6)
        np.testing.assert_allclose(row.map(), map_hw, rtol=1e-4, atol=1e-6)
        ys, xs = np.nonzero(row.mask())
        assert row.mask().shape == CROP
        assert len(ys) / (CROP[0] * CROP[1]) == pytest.approx(row.mask_area)
        scale_x, scale_y, offset_x, offset_y = decoded.geometry
        for x0, y0, x1, y1 in row.boxes:
            assert offset_x + scale_x * xs.min() - 1 <= x0 < x1 <= offset_x + scale_x * (xs.max() + 1) + 1
            assert offset_y + scale_y * ys.min() - 1 <= y0 < y1 <= offset_y + scale_y * (ys.max() + 1) + 1
        assert map_in_original(row).shape == (44, 60)
    with pytest.raises(UserError, match=r"crop: \[32, 48\] there, 32 requested"):
        extract(shards, out, crop=32, target="label")


def test_square_runs_keep_their_fingerprint(shards: Path, tmp_path: Path) -> None:
    prints = set()
    for crop in (32, (32, 32)):
        assert extract(shards, tmp_path / str(crop), crop=crop, target="top1") == 0
        _, run = load_run_folder(str(tmp_path / str(crop)))
        assert run.config.to_dict()["crop"] == 32
        prints.add(run.fingerprint)
    assert len(prints) == 1


@pytest.mark.slow
def test_a_leaderboard_judges_and_shows_it(shards: Path, tmp_path: Path) -> None:
    request = replace(REQUEST, shards=[str(shards)], method="cam,gradient", target="top1", torch_threads=1, crop=CROP)
    judging = EvaluateRequest([], metrics=list(FAMILIES), torch_threads=1)
    options = RunOptions(str(tmp_path / "board"), engine="local", device="cpu")
    board = make_leaderboard(replace(request, layer=None), [], judging, options, 3)
    assert not board.evaluation.unread
    assert len(board.evaluation.runs) == 2
    for judged in board.evaluation.runs:
        assert all(np.isfinite(estimate.value) for estimate in judged.estimates.values() if estimate.count)
    assert (tmp_path / "board" / "leaderboard.html").read_text().count("<image ") > 6


@pytest.mark.slow
def test_the_command_takes_height_and_width(shards: Path, tmp_path: Path) -> None:
    common = ["extract", str(shards), "--model", "making:tiny", "--method", "cam", "--resize", "40", "--device", "cpu"]
    ended = call(*common, "--target", "top1", "--out", str(tmp_path / "run"), "--crop", "32x48")
    assert ended.returncode == 0, ended.stderr
    assert load_run_folder(str(tmp_path / "run"))[1].config.preprocess.crop == CROP
    assert call("show", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")).returncode == 0
    assert "crop 32x48" in (tmp_path / "page.html").read_text()
    form = "is not a number of pixels, or height x width, as 224 or 224x448"
    for wrong, said in (("0", form), ("32x", form), ("32x48x3", form), ("-3x4", form), ("48x64", "--crop 48x64: the")):
        ended = call(*common, "--out", str(tmp_path / "other"), f"--crop={wrong}")
        assert ended.returncode == 2
        assert said in ended.stderr
    assert (to_side("224X448"), to_side("224x224")) == ((224, 448), 224)


def test_every_method_keeps_the_shape() -> None:
    torch.manual_seed(0)
    model, x_BCHW = Tiny().eval(), torch.randn(2, 3, *CROP)
    options: dict[str, Any] = {
        "cameras": {"sizes": [32, 48]},
        "occlusion": {"window": 8, "stride": 8},
        "rise": {"masks": 4},
    }
    refused = set()
    for name in set(available()) - {"casm", "localizer"}:
        try:
            with build(name, model, input_side=CROP, **options.get(name, {})) as method:
                height, width = method(x_BCHW).shape[1:]
        except UserError:
            refused.add(name)
            continue
        assert height * CROP[1] == width * CROP[0], name
    assert (
        not {"cam", "grad-cam", "cameras", "lrp", "relevance-cam", "score-cam", "ablation-cam", "occlusion"} & refused
    )


def test_layers_are_checked_at_the_shape() -> None:
    model = load("odd_models:Turned", side=CROP).model
    check_layers(model, ["conv"], CROP)
    for layer in ("turned", "tokens"):
        with pytest.raises(UserError, match=r"no grid.* at 32 x 48 pixels; layers that fit: conv|do not follow"):
            check_layers(model, [layer], CROP)


@pytest.mark.slow
def test_transformers_of_timm_take_another_size() -> None:
    made = load("timm:vit_tiny_patch16_224", "none", side=(32, 64))
    with build("grad-cam", made.model, input_side=(32, 64)) as method:
        assert method(torch.randn(1, 3, 32, 64)).shape == (1, 2, 4)


def test_jobs_on_squares_refuse_other_shapes() -> None:
    with pytest.raises(UserError, match="takes square images only, not 32 x 48 pixels"):
        square_of(CROP)
