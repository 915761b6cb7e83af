"""The GPU decoder: simple JPEG files go to nvJPEG in batches, all others to the CPU, with the statuses of the CPU.

Without a GPU, torchcodec's CPU function takes the place of nvJPEG, and the rest runs on the CPU.
"""

import io
import random
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import gpu_decode
import numpy as np
import pytest
import torch
from images import NOISE_HWC, encoded
from mutate import mutate_bytes
from PIL import Image
from test_jpeg import CAT, PREPROCESS, bomb, jpeg, orientation, plain_files, with_exif, with_segment

from saltern.pipeline.shards import nvjpeg as module
from saltern.pipeline.shards.decoder import CpuDecoder, decode_jpeg, nvjpegs
from saltern.pipeline.shards.jpeg import plain_frame
from saltern.pipeline.shards.nvjpeg import GpuDecoder
from saltern.schemas.saliency import DECODE_FAILED, OK, TOO_LARGE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEAR = 3 if DEVICE.type == "cpu" else 80  # levels: nvJPEG repeats colours where libjpeg interpolates them
GOOD = [jpeg(CAT.resize((90 + 20 * number, 80))) for number in range(9)]
MARK = b"marked"


class Jpegs:
    """nvJPEG's function, or what takes its place. It counts images, and fails for batches with a marked one."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.decoded = 0
        plain = decode_jpeg()
        on_cpu = None if plain is None else partial(plain, mode="RGB")
        self._decode = next(iter(nvjpegs().values())) if DEVICE.type == "cuda" else on_cpu

    def __call__(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        self.sizes.append(len(images))
        if any(MARK in image.numpy().tobytes() for image in images):
            raise RuntimeError("Error while decoding JPEG images: Failed to decode batch: 2")
        assert self._decode is not None
        made: list[torch.Tensor] = self._decode(images)
        self.decoded += len(images)
        return made


def gpu_decoder(jpegs: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> GpuDecoder:
    return GpuDecoder(CpuDecoder(PREPROCESS, decode_jpeg()), jpegs, "nvjpeg (test)", DEVICE, 2)


def compare(images: Sequence[bytes], decoder: GpuDecoder, near: int = NEAR) -> Counter[str]:
    """Check a decoder against the CPU's, and return the statuses."""
    found, expected = decoder(images), CpuDecoder(PREPROCESS)(images)
    assert found.problems == expected.problems
    good = [position for position in range(len(images)) if position not in expected.problems]
    assert (found.size_B2[good] == expected.size_B2[good]).all()
    assert (found.geometry_B4[good] == expected.geometry_B4[good]).all()
    off = (found.pixels_BHWC[good].cpu().int() - expected.pixels_BHWC[good].int()).abs()
    assert off.numel() == 0 or off.max() <= near
    return Counter(status for status, _ in expected.problems.values()) + Counter({OK: len(good)})


def test_simple_files_are_decoded_in_one_call() -> None:
    jpegs = Jpegs()
    assert compare(GOOD, gpu_decoder(jpegs)) == {OK: 9}
    assert jpegs.sizes == [9]


def test_every_plain_file_has_the_pixels_of_the_cpu() -> None:
    jpegs = Jpegs()
    files = list(plain_files())
    compare([data for _, data, _ in files], gpu_decoder(jpegs), 6 if DEVICE.type == "cpu" else 255)
    assert jpegs.decoded == sum(simple for _, _, simple in files)


OTHERS = [
    encoded(NOISE_HWC),
    jpeg(progressive=True),
    jpeg(CAT.convert("CMYK")),
    jpeg(keep_rgb=True),
    with_exif(orientation(6)),
    jpeg() + b"more",
    jpeg()[:-2],
    jpeg()[:-200],
    jpeg()[:-100] + b"\xff\x01" + jpeg()[-98:],
    with_segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"),
    bomb(16_384, 16_384),
    b"",
    b"no image",
]


def test_other_files_are_decoded_on_the_cpu() -> None:
    jpegs = Jpegs()
    images = [image for pair in zip(GOOD * 2, OTHERS, strict=False) for image in pair]
    found = compare(images, gpu_decoder(jpegs))
    assert found[TOO_LARGE] == 1
    assert found[DECODE_FAILED] >= 3
    assert jpegs.decoded == len(images) // 2 + 1  # one has a marker in its scan, which is seen on the device


def test_markers_in_a_scan_are_seen() -> None:
    head, scan = bytes([0xFF, 0xDA, 0xFF, 0x01, 7, 8]), bytes([1, 0xFF, 0, 2, 0xFF, 0xD0, 3, 0xFF, 0xD7, 0xFF, 0])
    end, files = b"\xff\xd9", [head + scan + b"\xff\xd9"]
    files += [head + scan + bytes([0xFF, marker]) + scan + end for marker in (1, 0xC0, 0xCF, 0xD8, 0xD9, 0xDA, 0xFF)]
    files += [head + scan + bytes([0xFF, marker]) + scan + end for marker in (0, 0xD1, 0xD6)] + [head + end]
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    found = module.single_scans(tensors, [len(head)] * len(files), DEVICE).tolist()
    assert found == [True] + [False] * 7 + [True] * 4


class Lenient(Jpegs):
    """A function that shows black where libjpeg fails."""

    def __call__(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        made = []
        for image in images:
            try:
                made += super().__call__([image])
            except RuntimeError:
                frame = plain_frame(image.numpy().tobytes())
                assert frame is not None
                made.append(torch.zeros((3, frame.height, frame.width), dtype=torch.uint8, device=DEVICE))
        return made


def test_a_damaged_scan_has_the_status_of_the_cpu_if_nvjpeg_shows_it() -> None:
    rng, found = random.Random(0), Counter[str]()
    decoder = gpu_decoder(Lenient())
    for _ in range(10):
        images = []
        for data in GOOD:
            start = data.index(b"\xff\xda") + 20
            images.append(data[:start] + mutate_bytes(data[start:-2], rng) + data[-2:])
        found += compare(images, decoder, 255)
    assert min(found[OK], found[DECODE_FAILED]) > 10


def test_an_image_that_nvjpeg_refuses_costs_no_other() -> None:
    jpegs = Jpegs()
    images = [*GOOD, *GOOD[:7]]
    for bad in (3, 12):
        images[bad] = jpeg(comment=MARK)
    assert compare(images, gpu_decoder(jpegs)) == {OK: 16}
    assert jpegs.decoded == 14
    assert len(jpegs.sizes) <= 2 * 2 * 4 + 1  # each bad image is found by halving


def test_if_nvjpeg_refuses_all_the_cpu_decodes_all() -> None:
    def refuse(images: list[torch.Tensor]) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert compare([*GOOD, b""], gpu_decoder(refuse), 0) == {OK: 9, DECODE_FAILED: 1}


def test_a_failed_batch_is_released_before_its_halves_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs, resample, held = Jpegs(), module.resample_regions, []

    def scarce(images: Sequence[torch.Tensor], *how: object) -> torch.Tensor:
        assert [image for image in held if image() is not None] == []
        if len(images) > 2:
            held.extend(weakref.ref(image) for image in images)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return resample(images, *how)

    monkeypatch.setattr(module, "resample_regions", scarce)
    assert compare(GOOD, gpu_decoder(jpegs)) == {OK: 9}
    assert jpegs.sizes == [9, 4, 2, 2, 5, 2, 3, 1, 2]


@pytest.mark.parametrize("error", [torch.AcceleratorError("an illegal access"), RuntimeError("CUDA error: launch")])
def test_a_lost_device_is_an_error(error: RuntimeError) -> None:
    def lose(images: list[torch.Tensor]) -> list[torch.Tensor]:
        raise error

    with pytest.raises(RuntimeError) as raised:
        gpu_decoder(lose)(GOOD)
    assert raised.value is error


def test_the_pixels_of_a_call_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs = Jpegs()
    monkeypatch.setattr(module, "MAX_PIXELS", 3 * 90 * 80)
    images = [jpeg(CAT.resize((90, 80)))] * 7
    assert compare(images, gpu_decoder(jpegs)) == {OK: 7}
    assert jpegs.sizes == [3, 3, 1]


def test_no_images_and_no_simple_images() -> None:
    decoder = gpu_decoder(Jpegs())
    assert decoder([]).pixels_BHWC.shape == (0, 56, 56, 3)
    assert compare([b""], decoder) == {DECODE_FAILED: 1}


@pytest.mark.slow
def test_damaged_files_have_the_statuses_of_the_cpu() -> None:
    rng, jpegs, found = random.Random(0), Jpegs(), Counter[str]()
    decoder, sources = gpu_decoder(jpegs), [data for _, data, _ in plain_files()]
    for _ in range(20):
        images = [mutate_bytes(rng.choice(sources), rng) for _ in range(16)]
        found += compare(images, decoder, 255)
    assert min(found[OK], found[DECODE_FAILED], jpegs.decoded) > 30


def test_two_threads_may_decode_at_once() -> None:
    decoder = gpu_decoder(Jpegs())
    expected = decoder(GOOD).pixels_BHWC.cpu()
    with ThreadPoolExecutor(2) as threads:
        for batch in threads.map(decoder, [GOOD] * 6):
            assert (batch.pixels_BHWC.cpu() == expected).all()


def test_grey_files_have_three_equal_channels() -> None:
    image = np.asarray(Image.open(io.BytesIO(jpeg(CAT.convert("L")))))
    assert image.ndim == 2
    pixels_HWC = gpu_decoder(Jpegs())([jpeg(CAT.convert("L"))]).pixels_BHWC[0]
    assert (pixels_HWC == pixels_HWC[..., :1]).all()


@pytest.mark.slow
def test_the_script_for_a_machine_with_a_gpu_passes_its_checks() -> None:
    for name, passed, figures in gpu_decode.checks([*GOOD, jpeg(CAT, progressive=True)], 0.2):
        assert passed, (name, figures)
