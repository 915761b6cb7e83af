"""Decode image files to the network's uint8 input and its geometry. Pillow is used only here."""

import contextlib
import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from saltern.schemas.config import Preprocess
from saltern.schemas.saliency import DECODE_FAILED, TOO_LARGE

MAX_PIXELS = 2**27  # 512 MiB once decoded; checked on the header, before decoding
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")  # none of these can run a program
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_PILLOW = r"PIL\."
warnings.filterwarnings("ignore", module=_PILLOW)
_QUIET = warnings.filters[0]


class DecodeError(Exception):
    """An image that cannot be decoded, with the row's status and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(slots=True)
class Decoded:
    """One decoded image."""

    pixels_HWC: NDArray[np.uint8]  # noqa: N815 - (crop, crop, 3), RGB, writable
    image_height: int  # of the upright original, pixels
    image_width: int
    geometry: tuple[float, float, float, float]  # scale x, scale y, offset x, offset y: see saltern.schemas.saliency


def decode(data: bytes, preprocess: Preprocess) -> Decoded:
    """Decode an image, turn it upright, resize and crop it.

    The pixels equal those of torchvision's preset, Resize(resize) on the PIL image and then CenterCrop(crop), except
    that a few values of a thousand differ by one level. (More can differ in an image more than twice as high as wide,
    as Pillow 13 swaps its two passes for it.) Both steps are one resampling of only the crop's region, so that a strip
    of 1 x 5000 pixels never becomes 256 x 1,280,000.

    Args:
        data: the image file.
        preprocess: its resize, crop, squash and interpolation are used. `resize` is at least `crop`.

    Raises:
        DecodeError: the bytes cannot be decoded. No other exception is raised.
    """
    image = decode_image(data)
    width, height = image.size
    geometry = _geometry(width, height, preprocess)
    small = _resample(image, geometry, preprocess.crop, INTERPOLATIONS[preprocess.interpolation])
    return Decoded(np.array(small), height, width, geometry)


def decode_image(data: bytes) -> Image.Image:
    """Return the whole image, RGB and upright by its EXIF; of an animation the first frame.

    Raises:
        DecodeError: the bytes cannot be decoded. No other exception is raised.
    """
    _silence()
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.size)
        image.load()
        with contextlib.suppress(Exception):  # damaged metadata does not invalidate the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(TOO_LARGE, _one_line(error)) from error
    except UnidentifiedImageError as error:
        begins = f"it begins with {data[:8].hex(' ')}" if data else "it is empty"
        raise DecodeError(DECODE_FAILED, f"the image member is not an image of a known format: {begins}") from error
    except Exception as error:  # Pillow's parsers raise struct.error, KeyError, ZeroDivisionError...
        reason = f"damaged image: {_one_line(error)} ({type(error).__name__}, {len(data)} bytes)"
        raise DecodeError(DECODE_FAILED, reason) from error


def _geometry(width: int, height: int, preprocess: Preprocess) -> tuple[float, float, float, float]:
    """Return scale and offset of the crop in the original; size and offset are rounded as torchvision does."""
    crop, resize = preprocess.crop, max(preprocess.resize, preprocess.crop)
    if preprocess.squash:
        return width / crop, height / crop, 0.0, 0.0
    short = min(width, height)
    new_width = resize if width == short else int(resize * width / short)
    new_height = resize if height == short else int(resize * height / short)
    scale_x, scale_y = width / new_width, height / new_height
    left, top = round((new_width - crop) / 2.0), round((new_height - crop) / 2.0)
    return scale_x, scale_y, left * scale_x, top * scale_y


def _resample(
    image: Image.Image, geometry: tuple[float, float, float, float], crop: int, how: Image.Resampling
) -> Image.Image:
    """Resample the crop's region to crop x crop.

    The region is cut out first, with the margin that the filter reads. Pillow stores a box as float32, which is more
    precise near zero, and chooses the order of its two passes by the shape of the image, not of the box.
    """
    (scale_x, scale_y, x0, y0), (width, height) = geometry, image.size
    x1, y1 = min(x0 + scale_x * crop, width), min(y0 + scale_y * crop, height)
    margin_x, margin_y = 3 * max(scale_x, 1), 3 * max(scale_y, 1)
    left, top = max(int(x0 - margin_x), 0), max(int(y0 - margin_y), 0)
    cut = image.crop((left, top, min(math.ceil(x1 + margin_x), width), min(math.ceil(y1 + margin_y), height)))
    return cut.resize((crop, crop), how, (x0 - left, y0 - top, x1 - left, y1 - top))


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DecodeError(DECODE_FAILED, f"the image has no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise DecodeError(TOO_LARGE, f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as Pillow does, except deep greys, which Pillow would clip at 255."""
    if image.mode.startswith("I"):  # 16 bits, or 16 bits kept in 32
        deep_HW = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((deep_HW + 128) // 257).astype(np.uint8))
    elif image.mode == "F":  # white is 255 if any value exceeds 1.0
        float_HW = np.nan_to_num(np.asarray(image))
        white = 1.0 if float_HW.max() <= 1 else 255.0
        image = Image.fromarray((float_HW.clip(0, white) * (255 / white)).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _silence() -> None:
    """Ignore Pillow's warnings on damaged metadata, and no others.

    The filter is permanent, as `warnings.catch_warnings` is not safe in threads. It is set again only if another filter
    precedes it, as each change makes Python repeat the warnings that it shows only once.
    """
    if warnings.filters[:1] != [_QUIET]:
        warnings.filterwarnings("ignore", module=_PILLOW)
