"""Decode image files to the network's uint8 input and its geometry. Pillow is used only here."""

import contextlib
import io
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from saltern.pipeline.shards.metadata import without_metadata
from saltern.schemas.config import Preprocess
from saltern.schemas.saliency import DECODE_FAILED, OUT_OF_MEMORY, TOO_LARGE

MAX_PIXELS = 2**27  # 512 MiB as RGB, of which decoding holds at most two copies; checked on the header
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")  # none of these can run a program
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_STRIP = 2**20  # pixels of a deep grey image that are converted at once
_SCARCE = threading.Lock()
_PILLOW = r"PIL\."
warnings.filterwarnings("ignore", module=_PILLOW)
_QUIET = warnings.filters[0]


Geometry = tuple[float, float, float, float]  # scale x, scale y, offset x, offset y: see saltern.schemas.saliency
Region = tuple[tuple[int, int, int, int], tuple[float, float, float, float]]  # bounds and box, as `window` gives them
# From an upright image's width and height, the region to resample to the input. Only what is in the bounds is read. A
# box with its right side first mirrors the image.
Cut = Callable[[int, int], Region]


class DecodeError(Exception):
    """An image that cannot be decoded, with the row's status and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(slots=True)
class Decoded:
    """One decoded image."""

    pixels_HWC: NDArray[np.uint8]  # noqa: N815 - of the crop's height and width, RGB, writable
    image_height: int  # of the upright original, pixels
    image_width: int
    geometry: Geometry


def decode(data: bytes, preprocess: Preprocess, cut: Cut | None = None) -> Decoded:
    """Decode an image, turn it upright, resize and crop it.

    The pixels equal those of torchvision's preset, Resize(resize) on the PIL image and then CenterCrop(crop), except
    that a few values of a thousand differ by one level. (More can differ in an image more than twice as high as wide,
    as Pillow 13 swaps its two passes for it.) Both steps are one resampling of only the crop's region, so that a strip
    of 1 x 5000 pixels never becomes 256 x 1,280,000.

    Args:
        data: the image file.
        preprocess: its resize, crop, squash and interpolation are used. `resize` is at least `crop`.
        cut: takes the place of the preprocess's resize, crop and squash.

    Raises:
        DecodeError: the bytes cannot be decoded. No other exception is raised.
    """
    image = decode_image(data)
    width, height = image.size
    geometry, (bounds, box) = region_of(width, height, preprocess, cut)
    try:
        return Decoded(_resize(image.crop(bounds), box, preprocess), height, width, geometry)
    except MemoryError as error:
        raise _no_memory(data) from error


def from_pixels(pixels_HWC: NDArray[np.uint8], preprocess: Preprocess, cut: Cut | None = None) -> Decoded:
    """Return the input of an image that is decoded already, RGB and contiguous, as `decode` resamples it."""
    height, width, _ = pixels_HWC.shape
    geometry, ((left, top, right, bottom), box) = region_of(width, height, preprocess, cut)
    start, stride = 3 * (top * width + left), 3 * width
    size = right - left, bottom - top
    part = Image.frombuffer("RGB", size, pixels_HWC.reshape(-1)[start:], "raw", "RGB", stride, 1)
    return Decoded(_resize(part, box, preprocess), height, width, geometry)


def decode_image(data: bytes) -> Image.Image:
    """Return the whole image, RGB and upright by its EXIF; of an animation the first frame.

    Raises:
        DecodeError: the bytes cannot be decoded. No other exception is raised.
    """
    _silence()
    try:
        return _fitting(data)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # beyond Pillow's limit, which is higher
        size = f"{pixels[0]} pixels" if pixels else "too many pixels"
        raise DecodeError(TOO_LARGE, f"{size}; at most {MAX_PIXELS} are decoded") from error
    except Exception as error:  # Pillow's parsers raise struct.error, KeyError, ZeroDivisionError...
        for bare in without_metadata(data):
            with _except_memory():
                return _upright(bare)
        raise DecodeError(DECODE_FAILED, _reason(data, error)) from error


def _fitting(data: bytes) -> Image.Image:
    """Decode an image. If memory runs out, wait for a time when no other such image is decoded, and try once more."""
    try:
        return _upright(data)
    except MemoryError:
        with _SCARCE:
            try:
                return _upright(data)
            except MemoryError as error:
                raise _no_memory(data) from error


def _upright(data: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.size, MAX_PIXELS // 2 if image.format == "WEBP" else MAX_PIXELS)  # libwebp holds four copies
    image.load()
    with _except_memory():  # damaged metadata does not invalidate the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


@contextlib.contextmanager
def _except_memory() -> Iterator[None]:
    """Suppress every error but that of memory, which says nothing about the image."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:  # noqa: S110
        pass


def _reason(data: bytes, error: Exception) -> str:
    cause = _cause(data) if isinstance(error, UnidentifiedImageError) else error
    if cause is None:
        begins = f"it begins with {data[:8].hex(' ')}" if data else "it is empty"
        return f"the image member is not an image of a known format: {begins}"
    return f"damaged image: {_one_line(cause)} ({type(cause).__name__}, {len(data)} bytes)"


def _cause(data: bytes) -> Exception | None:
    """Return the error of the format's own parser, which Pillow hides; None if the format is not known."""
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        try:
            if accept is None or accept(data[:16]) is not True:
                continue
            factory(io.BytesIO(data), "")
        except Exception as error:
            if len(data) > 16:
                return error
    return None


def _no_memory(data: bytes) -> DecodeError:
    return DecodeError(OUT_OF_MEMORY, f"the machine has no memory left to decode the image ({len(data)} bytes)")


def region_of(width: int, height: int, preprocess: Preprocess, cut: Cut | None = None) -> tuple[Geometry, Region]:
    """Return the geometry of an image's input, and the region that it is resampled from."""
    if cut is None:
        geometry = geometry_of(width, height, preprocess)
        return geometry, window(width, height, geometry, preprocess.shape)
    bounds, box = cut(width, height)
    (rows, columns), (x0, y0, x1, y1) = preprocess.shape, box
    return ((x1 - x0) / columns, (y1 - y0) / rows, bounds[0] + x0, bounds[1] + y0), (bounds, box)


def geometry_of(width: int, height: int, preprocess: Preprocess) -> Geometry:
    """Return scale and offset of the crop in the original; size and offset are rounded as torchvision does.

    The image is resized to cover a frame of the crop's shape whose shorter side is `resize`.
    """
    rows, columns = preprocess.shape
    if preprocess.squash:
        return width / columns, height / rows, 0.0, 0.0
    short = min(rows, columns)
    resize = max(preprocess.resize, short)
    frame_height, frame_width = round(resize * rows / short), round(resize * columns / short)
    fits_width = width * frame_height <= height * frame_width  # the image is narrower than the frame
    new_width = frame_width if fits_width else int(frame_height * width / height)
    new_height = int(frame_width * height / width) if fits_width else frame_height
    scale_x, scale_y = width / new_width, height / new_height
    left, top = round((new_width - columns) / 2.0), round((new_height - rows) / 2.0)
    return scale_x, scale_y, left * scale_x, top * scale_y


def window(width: int, height: int, geometry: Geometry, shape: tuple[int, int]) -> Region:
    """Return the bounds in the original of the pixels that the crop reads, and the crop's box within them.

    Both are left, top, right, bottom. The bounds have the margin that the filter reads. They are cut out first, as
    Pillow stores a box as float32, which is more precise near zero, and chooses the order of its two passes by the
    shape of the image, not of the box.
    """
    scale_x, scale_y, x0, y0 = geometry
    x1, y1 = min(x0 + scale_x * shape[1], width), min(y0 + scale_y * shape[0], height)
    margin_x, margin_y = 3 * max(scale_x, 1), 3 * max(scale_y, 1)
    left, top = max(int(x0 - margin_x), 0), max(int(y0 - margin_y), 0)
    bounds = left, top, min(math.ceil(x1 + margin_x), width), min(math.ceil(y1 + margin_y), height)
    return bounds, (x0 - left, y0 - top, x1 - left, y1 - top)


def _resize(part: Image.Image, box: tuple[float, float, float, float], preprocess: Preprocess) -> NDArray[np.uint8]:
    left, top, right, bottom = box
    upright = min(left, right), top, max(left, right), bottom
    pixels_HWC = np.array(part.resize(preprocess.shape[::-1], INTERPOLATIONS[preprocess.interpolation], upright))
    return pixels_HWC if left <= right else pixels_HWC[:, ::-1]


def _check_size(size: tuple[int, int], limit: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DecodeError(DECODE_FAILED, f"the image has no pixels: {width} x {height}")
    if width * height > limit:
        raise DecodeError(TOO_LARGE, f"{width} x {height} pixels; at most {limit} are decoded")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as Pillow does, except deep greys, which Pillow would clip at 255."""
    if image.mode.startswith("I"):  # 16 bits, or 16 bits kept in 32
        image = _grey(image, lambda deep_HW: (deep_HW.clip(0, 65535).astype(np.uint32) + 128) // 257)
    elif image.mode == "F":  # white is 255 if any value exceeds 1.0
        white = 1.0 if max(np.nan_to_num(strip_HW).max() for strip_HW in _strips(image)) <= 1 else 255.0
        image = _grey(image, lambda float_HW: (np.nan_to_num(float_HW).clip(0, white) * (255 / white)).round())
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image, levels: Callable[[NDArray[Any]], NDArray[Any]]) -> Image.Image:
    """Return an 8-bit grey image; `levels` gives the values of a strip, in 0..255."""
    return Image.fromarray(np.concatenate([levels(strip_HW).astype(np.uint8) for strip_HW in _strips(image)]))


def _strips(image: Image.Image) -> Iterator[NDArray[Any]]:
    """Yield the image's rows in strips, which bound the memory of the arrays."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _silence() -> None:
    """Ignore Pillow's warnings on damaged metadata, and no others.

    The filter is permanent, as `warnings.catch_warnings` is not safe in threads. It is set again only if another filter
    precedes it, as each change makes Python repeat the warnings that it shows only once.
    """
    if warnings.filters[:1] != [_QUIET]:
        warnings.filterwarnings("ignore", module=_PILLOW)
