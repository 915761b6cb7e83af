"""The resampling in batches gives the pixels of Pillow's, within two levels."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image

from saltern.pipeline.shards import resample as module
from saltern.pipeline.shards.decode import from_pixels, geometry_of
from saltern.pipeline.shards.decoder import CpuDecoder, as_tensor, decode_jpeg
from saltern.pipeline.shards.resample import resample
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.config import Preprocess
from saltern.schemas.run import Shard

CAT_HWC = skimage.data.chelsea()


def photo(width: int, height: int) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(CAT_HWC).resize((width, height)))


def planar(image_HWC: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(image_HWC).permute(2, 0, 1).contiguous()


def differences(images: Sequence[NDArray[np.uint8]], preprocess: Preprocess) -> NDArray[np.int64]:
    """Return the differences to Pillow in levels, (B, h, w, C)."""
    geometries = [geometry_of(image.shape[1], image.shape[0], preprocess) for image in images]
    found_BHWC = resample([planar(image) for image in images], geometries, preprocess)
    assert found_BHWC.dtype == torch.uint8
    expected_BHWC = np.stack([from_pixels(image, preprocess).pixels_HWC for image in images])
    return np.abs(found_BHWC.numpy().astype(np.int64) - expected_BHWC)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("squash", [False, True])
def test_photographs_of_any_size_are_within_two_levels_of_pillow(interpolation: str, squash: bool) -> None:
    draw = random.Random(0)
    for _ in range(4):
        resize = draw.randint(20, 150)
        crop = resize if squash else draw.randint(9, resize)
        short, images = draw.randint(8, 300), []
        for _ in range(5):
            sides = short, draw.randint(short, 4 * short)
            # Pillow may swap its two passes for a squashed image that is high, which rounds otherwise.
            images.append(photo(*(sides[::-1] if squash or draw.random() < 0.5 else sides)))
        off = differences(images, Preprocess(resize, crop, squash, interpolation))
        assert off.max() <= 2
        assert off.mean() < 0.06


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 40), (2, 2), (223, 225), (5000, 3)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_odd_sizes(size: tuple[int, int], interpolation: str) -> None:
    assert differences([photo(*size)], Preprocess(64, 56, False, interpolation)).max() <= 2


def test_one_colour_stays_as_it_is() -> None:
    for level in (0, 1, 127, 254, 255):
        image = np.full((300, 421, 3), level, np.uint8)
        assert differences([image], Preprocess(64, 56)).max() == 0


def test_high_images_that_pillow_resamples_in_the_other_order() -> None:
    off = differences([photo(100, 390), photo(60, 500)], Preprocess(64, 64, True))
    assert off.max() <= 2
    assert off.mean() < 0.2


def test_each_image_is_as_in_a_batch_of_its_own() -> None:
    images = [photo(300 + 10 * number, 200 + 37 * number) for number in range(8)]
    preprocess = Preprocess(64, 56)
    geometries = [geometry_of(image.shape[1], image.shape[0], preprocess) for image in images]
    whole = resample([planar(image) for image in images], geometries, preprocess)
    for number, image in enumerate(images):
        (one_HWC,) = resample([planar(image)], [geometries[number]], preprocess)
        assert (one_HWC.int() - whole[number].int()).abs().max() <= 1
        assert (one_HWC == whole[number]).float().mean() > 0.999


def test_few_pixels_are_resampled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [photo(120, 90) for _ in range(9)]
    expected = differences(images, Preprocess(64, 56))
    sizes: list[int] = []
    multiply = module._multiply

    def count(levels_BCSS: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        sizes.append(levels_BCSS[:, 0].numel())
        return multiply(levels_BCSS, *weights)

    monkeypatch.setattr(module, "_MOST", 2 * 128 * 96)
    monkeypatch.setattr(module, "_multiply", count)
    assert (differences(images, Preprocess(64, 56)) == expected).all()
    assert len(sizes) == 5
    assert max(sizes) <= 2 * 128 * 96


def test_the_photographs_are_within_the_documented_bound(shared_data: Path) -> None:
    """docs/speed.md states the bound over all 500; this takes every fifth."""
    preprocess, decode = Preprocess(), decode_jpeg()
    assert decode is not None
    decoder, means, worst = CpuDecoder(preprocess, decode), [], 0
    for path in sorted((shared_data / "imagenet-sample").glob("*.tar")):
        samples = list(read_samples(Shard("s", str(path), path.stat().st_size)))
        images = [sample.image or b"" for sample in samples[::5]]
        expected = decoder(images)
        decoded = [decode(as_tensor(image), mode="RGB") for image in images]
        found_BHWC = resample(decoded, [tuple(row) for row in expected.geometry_B4], preprocess)
        off = (found_BHWC.int() - expected.pixels_BHWC.int()).abs()
        means.append(off.float().mean().item())
        worst = max(worst, int(off.max()))
    assert len(means) == 5
    assert worst <= 2
    assert np.mean(means) < 0.03
