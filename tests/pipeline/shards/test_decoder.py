"""A decoder gives the pixels, sizes and geometries of single images, and a problem for each bad one."""

import numpy as np
import torch
from images import NOISE_HWC, encoded, fails, with_exif

from saltern.pipeline.shards.decode import decode
from saltern.pipeline.shards.decoder import make_decoder
from saltern.schemas.config import Preprocess
from saltern.schemas.saliency import DECODE_FAILED

PREPROCESS = Preprocess(64, 56)
TURNED = with_exif(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")


def test_a_batch_has_the_images_of_single_calls() -> None:
    images = [encoded(NOISE_HWC), encoded(NOISE_HWC, "JPEG"), TURNED]
    batch = make_decoder(PREPROCESS)(images)
    for position, data in enumerate(images):
        one = decode(data, PREPROCESS)
        assert (batch.pixels_BHWC[position].numpy() == one.pixels_HWC).all()
        assert tuple(batch.size_B2[position]) == (one.image_height, one.image_width)
        assert tuple(batch.geometry_B4[position]) == one.geometry
    assert (batch.pixels_BHWC.dtype, batch.size_B2.dtype) == (torch.uint8, np.int32)
    assert not batch.problems


def test_a_bad_image_costs_only_its_slot() -> None:
    good = encoded(NOISE_HWC)
    batch = make_decoder(PREPROCESS)([good, b"", good, b"no image"])
    assert batch.problems == {number: (DECODE_FAILED, fails(data)) for number, data in ((1, b""), (3, b"no image"))}
    for position in (0, 2):
        assert (batch.pixels_BHWC[position].numpy() == decode(good, PREPROCESS).pixels_HWC).all()


def test_no_images_give_an_empty_batch() -> None:
    assert make_decoder(PREPROCESS)([]).pixels_BHWC.shape == (0, 56, 56, 3)
