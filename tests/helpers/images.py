"""Images of all kinds as files, and their decoding with the tests' settings."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from saltern.pipeline.shards.decode import Decoded, DecodeError, decode
from saltern.schemas.config import Preprocess
from saltern.schemas.saliency import DECODE_FAILED

rng = np.random.default_rng(0)
NOISE_HWC = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
SMOOTH_HW = np.linspace(0, 255, 60 * 80).reshape(60, 80).astype(np.uint8)


def encoded(image: Image.Image | NDArray[Any], format: str = "PNG", **options: Any) -> bytes:
    made = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(made, format, **options)
    return made.getvalue()


def square(data: bytes, **changes: Any) -> Decoded:
    return decode(data, Preprocess(**{"resize": 64, "crop": 56, **changes}))


def fails(data: bytes, status: str = DECODE_FAILED) -> str:
    with pytest.raises(DecodeError) as error:
        square(data)
    assert error.value.status == status
    assert error.value.reason
    assert "\n" not in error.value.reason
    assert " at 0x" not in error.value.reason  # an address would make rows differ between processes
    return error.value.reason


def deep() -> NDArray[np.uint16]:
    return np.linspace(0, 65535, 60 * 80).reshape(60, 80).round().astype(np.uint16)


def with_exif(raw: bytes) -> bytes:
    data = encoded(NOISE_HWC, "JPEG")
    body = b"Exif\0\0" + raw
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
