"""A decoder gives the pixels, sizes and geometries of single images, and a problem for each bad one; its choice."""

import socket
import sys
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import pytest
import torch
from images import NOISE_HWC, encoded, fails, with_exif

from saltern.pipeline.shards import decoder as module
from saltern.pipeline.shards.decode import decode
from saltern.pipeline.shards.decoder import choose_decoder, describe_decoder, make_decoder
from saltern.pipeline.shards.jpeg import plain_frame
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.saliency import DECODE_FAILED

PREPROCESS = Preprocess(64, 56)
PILLOW, TORCHCODEC = (f"{package} {version(package)}" for package in ("pillow", "torchcodec"))
NVJPEG = f"nvjpeg ({TORCHCODEC})"
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


def test_parts_of_larger_memory_are_decoded_as_files_are() -> None:
    jpeg = encoded(NOISE_HWC, "JPEG")
    files = [jpeg, encoded(NOISE_HWC), TURNED, jpeg[:-900], jpeg[:40], b"no image", b""]
    joined = memoryview(bytearray(b"".join(files)))
    starts = [sum(map(len, files[:number])) for number in range(len(files))]
    parts = [joined[start : start + len(data)] for start, data in zip(starts, files, strict=True)]
    whole, shared = make_decoder(PREPROCESS)(files), make_decoder(PREPROCESS)(parts)
    assert whole.problems == shared.problems
    assert whole.problems.keys() >= {4, 5, 6}
    for position in {*range(len(files))} - whole.problems.keys():
        assert (whole.pixels_BHWC[position] == shared.pixels_BHWC[position]).all()
        assert (whole.size_B2[position] == shared.size_B2[position]).all()
    assert plain_frame(parts[0]) == plain_frame(jpeg) is not None


def test_no_images_give_an_empty_batch() -> None:
    assert make_decoder(PREPROCESS)([]).pixels_BHWC.shape == (0, 56, 56, 3)


# The choice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_works", lambda function: True)


def without_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)


@pytest.mark.parametrize(
    ("choice", "device", "name"),
    [
        ("auto", "cpu", TORCHCODEC),
        ("cpu", "cpu", TORCHCODEC),
        ("cpu", "cuda", TORCHCODEC),
        ("auto", "cuda", NVJPEG),
        ("gpu", "cuda", NVJPEG),
    ],
)
def test_a_new_run_has_the_best_decoder_of_its_choice(choice: str, device: str, name: str) -> None:
    assert choose_decoder(choice, device) == name


def test_without_torchcodec_others_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchcodec(monkeypatch)
    assert choose_decoder("auto", "cpu") == PILLOW
    assert choose_decoder("gpu", "cuda") == f"nvjpeg (torchvision {version('torchvision')})"


@pytest.mark.parametrize(
    ("choice", "existing", "name"),
    [
        ("auto", "pillow", "pillow"),
        ("cpu", "pillow", "pillow"),
        ("cpu", "torchcodec 0.1", "torchcodec 0.1"),
        ("gpu", "pillow", NVJPEG),
        ("auto", "nvjpeg (torchcodec 0.1)", "nvjpeg (torchcodec 0.1)"),
        ("gpu", "nvjpeg (torchcodec 0.1)", "nvjpeg (torchcodec 0.1)"),
        ("cpu", "nvjpeg (torchcodec 0.1)", TORCHCODEC),
    ],
)
def test_an_existing_run_keeps_its_decoder_unless_the_choice_excludes_it(choice: str, existing: str, name: str) -> None:
    assert choose_decoder(choice, "cuda", existing) == name


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_cannot_decode_is_left_out_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_works", lambda function: False)
    assert choose_decoder("auto", "cuda") == TORCHCODEC
    with pytest.raises(UserError, match=r"--decode gpu: no nvJPEG works here; .* --decode cpu"):
        choose_decoder("gpu", "cuda")


def test_functions_are_tried_on_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(images: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    plain: Callable[..., list[torch.Tensor]] | None = module.decode_jpeg()
    assert plain is not None
    assert module._works(plain)
    assert not module._works(fail)


def test_on_a_gpu_the_user_reads_where_files_are_decoded() -> None:
    assert describe_decoder(NVJPEG, "cuda") == [f"JPEG files are decoded by {NVJPEG} on the GPU"]
    assert f"{TORCHCODEC} on the CPU" in describe_decoder(TORCHCODEC, "cuda")[0]
    assert not describe_decoder(TORCHCODEC, "cpu")


def test_gpu_needs_a_gpu_that_computes() -> None:
    with pytest.raises(UserError, match=r"--decode gpu .* needs --device cuda"):
        choose_decoder("gpu", "cpu")
    with pytest.raises(UserError, match="--decode 'card' is none of auto, cpu, gpu"):
        choose_decoder("card", "cpu")


@pytest.mark.parametrize("name", [PILLOW, TORCHCODEC])
def test_a_decoder_is_built_by_its_name(name: str) -> None:
    decoder = make_decoder(PREPROCESS, name)
    assert (decoder.name, decoder.device) == (name, torch.device("cpu"))


def test_older_runs_have_pillow_of_any_version() -> None:
    assert make_decoder(PREPROCESS, "pillow").name == PILLOW


@pytest.mark.usefixtures("gpu")
def test_a_gpu_decoder_is_built_by_its_name() -> None:
    decoder = make_decoder(PREPROCESS, NVJPEG, "cuda", 2)
    assert (decoder.name, decoder.device) == (NVJPEG, torch.device("cuda"))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "device"), [("torchcodec 0.1", "cpu"), ("pillow 1.0", "cpu"), (NVJPEG, "cpu"), ("nvjpeg (x 1)", "cuda")]
)
def test_a_decoder_that_is_not_here_is_one_line(name: str, device: str) -> None:
    with pytest.raises(UserError) as error:
        make_decoder(PREPROCESS, name, device)
    (line,) = str(error.value).splitlines()
    for part in (name, socket.gethostname(), TORCHCODEC, PILLOW, "install that version", "--out"):
        assert part in line


def test_a_run_of_torchcodec_is_not_resumed_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchcodec(monkeypatch)
    with pytest.raises(UserError, match=f"decoded by {TORCHCODEC}"):
        make_decoder(PREPROCESS, TORCHCODEC)
