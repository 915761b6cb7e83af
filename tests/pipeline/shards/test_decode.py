"""Decoded pixels equal torchvision's preset on real photographs; every mode and orientation is converted."""

import io
import random
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from images import NOISE_HWC, SMOOTH_HW, deep, encoded, square, with_exif
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from saltern.pipeline.shards.decode import decode, decode_image
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.config import Preprocess
from saltern.schemas.run import Shard


@cache
def photographs() -> list[NDArray[np.uint8]]:
    """Return photographs: landscape, portrait, square, smaller than the crop, with even and odd sides."""
    coffee, cat, astronaut = skimage.data.coffee(), skimage.data.chelsea(), skimage.data.astronaut()
    return [
        coffee,
        coffee.transpose(1, 0, 2),
        cat,
        cat[:299, :451],
        astronaut,
        astronaut[:511, 100:301],
        cat[:97, :131],
    ]


def preset(image: Image.Image, resize: int, crop: int, interpolation: str) -> NDArray[np.int64]:
    import torchvision.transforms as T
    from torchvision.transforms import InterpolationMode

    resized = T.Resize(resize, InterpolationMode(interpolation), antialias=True)(image.convert("RGB"))
    return np.asarray(T.CenterCrop(crop)(resized)).astype(np.int64)


# Against torchvision


@pytest.mark.slow  # imports torchvision
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (280, 280), (64, 57)])
def test_pixels_are_those_of_torchvision(interpolation: str, resize: int, crop: int) -> None:
    for photo_HWC in photographs():
        image = Image.fromarray(photo_HWC)
        ours = square(encoded(image, "BMP"), resize=resize, crop=crop, interpolation=interpolation).pixels_HWC
        difference = np.abs(ours - preset(image, resize, crop, interpolation))
        assert ours.shape == (crop, crop, 3)
        tall = photo_HWC.shape[0] > 2 * photo_HWC.shape[1]  # Pillow 13 swaps its two passes, which rounds differently
        assert difference.max() <= (16 if tall else 1)
        assert (difference > 0).mean() < (0.2 if tall else 0.005)


def test_pixels_are_those_of_torchvision_on_imagenet(shared_data: Path) -> None:
    path = shared_data / "imagenet-sample" / "imagenet-sample-000000.tar"
    worst, differ = 0, []
    for sample in read_samples(Shard("s", str(path), path.stat().st_size)):
        assert sample.image is not None
        image = Image.open(io.BytesIO(sample.image))
        assert image.getexif().get(ExifTags.Base.Orientation, 1) in (0, 1)
        ours = decode(sample.image, Preprocess(256, 224))
        difference = np.abs(ours.pixels_HWC - preset(image, 256, 224, "bilinear"))
        worst = max(worst, int(difference.max()))
        differ.append((difference > 0).mean())
        assert (ours.image_width, ours.image_height) == image.size
    assert worst <= 1
    assert np.median(differ) < 0.001


@pytest.mark.slow
def test_squash_is_a_plain_resize() -> None:
    for photo_HWC in photographs():
        image = Image.fromarray(photo_HWC)
        found = square(encoded(image), squash=True, crop=100, resize=7)
        expected_HWC = np.asarray(image.resize((100, 100), Image.Resampling.BILINEAR))
        assert (found.pixels_HWC == expected_HWC).all()
        assert found.geometry == (image.width / 100, image.height / 100, 0, 0)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (333, 500), (97, 131), (224, 224)])
@pytest.mark.parametrize("squash", [False, True])
def test_geometry_leads_back_to_the_original(height: int, width: int, squash: bool) -> None:
    # Each pixel's colour is its position, so the input's colour at (x, y) must match the geometry.
    y_HW, x_HW = np.mgrid[:height, :width]
    image_HWC = np.stack([x_HW * 255 / width, y_HW * 255 / height, 0 * x_HW], 2).round().astype(np.uint8)
    found = square(encoded(image_HWC), resize=128, crop=112, squash=squash)
    scale_x, scale_y, offset_x, offset_y = found.geometry
    for y, x in ((20, 30), (56, 56), (90, 17)):
        red, green, _ = found.pixels_HWC[y, x].tolist()
        assert offset_x + scale_x * (x + 0.5) - 0.5 == pytest.approx(red * width / 255, abs=0.01 * width)
        assert offset_y + scale_y * (y + 0.5) - 0.5 == pytest.approx(green * height / 255, abs=0.01 * height)
    assert offset_x + scale_x * 112 <= width + 1e-6
    assert offset_y + scale_y * 112 <= height + 1e-6


def test_pixels_can_be_written_to() -> None:
    assert square(encoded(NOISE_HWC)).pixels_HWC.flags.writeable


def test_a_resize_below_the_crop_does_not_leave_the_image() -> None:
    found = square(encoded(NOISE_HWC), resize=20, crop=56)
    assert (found.pixels_HWC == square(encoded(NOISE_HWC), resize=56, crop=56).pixels_HWC).all()


def test_any_shape_is_decoded() -> None:
    draw = random.Random(0)
    shapes = [(1, 1), (1, 5000), (5000, 1), (2, 3), (1, 65500), (4000, 3), (7, 7)]
    shapes += [(draw.randint(1, 700), draw.randint(1, 700)) for _ in range(60)]
    for width, height in shapes:
        data = encoded(Image.new("RGB", (width, height), (10, 20, 30)), "BMP")
        for interpolation in ("bilinear", "bicubic"):
            resize = draw.randint(1, 300)
            found = square(data, resize=resize, crop=draw.randint(1, resize), interpolation=interpolation)
            assert (found.image_width, found.image_height) == (width, height)
            assert (found.pixels_HWC == (10, 20, 30)).all()


# Odd images


def test_modes_are_converted_as_pillow_does() -> None:
    noise = Image.fromarray(NOISE_HWC)
    alpha = Image.fromarray(SMOOTH_HW)
    palette = noise.quantize(50)
    grey_alpha = Image.merge("LA", [noise.convert("L"), alpha])
    rgba = noise.copy()
    rgba.putalpha(alpha)
    cases = {
        "L": encoded(noise.convert("L")),
        "1": encoded(noise.convert("1")),
        "LA": encoded(grey_alpha),
        "RGBA": encoded(rgba),
        "P": encoded(palette),
        "P transparent": encoded(palette, transparency=bytes(range(50))),
        "P one transparent": encoded(palette, transparency=3),
        "CMYK jpeg": encoded(noise.convert("CMYK"), "JPEG"),
        "CMYK tiff": encoded(noise.convert("CMYK"), "TIFF"),
        "YCbCr tiff": encoded(noise.convert("YCbCr"), "TIFF"),
        "webp": encoded(rgba, "WEBP"),
        "gif": encoded(palette, "GIF"),
        "bmp": encoded(noise, "BMP"),
        "ppm": encoded(noise, "PPM"),
    }
    for name, data in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = Image.open(io.BytesIO(data)).convert("RGB")
        found = decode_image(data)
        assert found.mode == "RGB"
        assert (np.asarray(found) == np.asarray(expected)).all(), name


def test_adobe_cmyk_is_not_inverted() -> None:
    data = encoded(Image.new("CMYK", (40, 30), (10, 200, 30, 5)), "JPEG", quality=95)
    assert b"Adobe" in data[:20]  # Adobe's files store inverted inks
    found_HWC = np.asarray(decode_image(data)).astype(int)
    assert np.abs(found_HWC - np.array([245, 55, 225]) * 250 // 255).max() < 6


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(format: str) -> None:
    found_HWC = np.asarray(decode_image(encoded(deep(), format)))
    assert (found_HWC == (deep() / 257).round()[:, :, None]).all()
    assert found_HWC.std() > 50


def test_sixteen_bits_big_endian() -> None:
    image = Image.fromarray(deep().astype(">u2"))
    assert image.mode == "I;16B"
    assert (np.asarray(decode_image(encoded(image, "TIFF"))) == (deep() / 257).round()[:, :, None]).all()


def test_thirty_two_bit_integers_hold_sixteen_bits() -> None:
    image = Image.fromarray(deep().astype(np.int32))
    assert image.mode == "I"
    assert (np.asarray(decode_image(encoded(image, "TIFF"))) == (deep() / 257).round()[:, :, None]).all()


@pytest.mark.parametrize("white", [1, 255])
def test_floats(white: int) -> None:
    float_HW = (deep() / np.float32(65535)).astype(np.float32) * np.float32(white)
    float_HW[0, :3] = np.nan, -5, 0
    found_HWC = np.asarray(decode_image(encoded(float_HW, "TIFF")))
    assert found_HWC[0, :3].max() == 0
    assert np.abs(found_HWC[1:, :, 0] - deep()[1:] / 257).max() <= 0.501


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_of_several(format: str) -> None:
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "lime")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    found_HWC = np.asarray(decode_image(data)).astype(int)
    assert np.abs(found_HWC - (255, 0, 0)).max() < 5


@pytest.mark.slow
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_turned_upright(orientation: int, format: str) -> None:
    upright_HWC = skimage.data.chelsea()[:200, :300]
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # orientation that undoes each orientation
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = undo.get(orientation, 1)
    stored = Image.fromarray(upright_HWC)
    stored.info["exif"] = exif.tobytes()
    stored = Image.open(io.BytesIO(encoded(stored, "PNG", exif=exif)))
    stored = ImageOps.exif_transpose(stored)  # no longer upright
    exif[ExifTags.Base.Orientation] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})
    found = square(encoded(stored, format, exif=exif, **lossless), resize=100, crop=90)
    assert (found.image_height, found.image_width) == (200, 300)
    expected_HWC = preset(Image.fromarray(upright_HWC), 100, 90, "bilinear")
    assert np.abs(found.pixels_HWC - expected_HWC).mean() < 2


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # orientation 99
        b"II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x0e\x01\x02\0\xff\0\0\0\xff\xff\xff\x7f",
    ],
)
def test_damaged_exif_does_not_change_the_image(raw: bytes) -> None:
    found = square(with_exif(raw))
    assert sorted((found.image_height, found.image_width)) == [60, 80]
