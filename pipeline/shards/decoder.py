"""Decode batches of image files. The run's decoder is named in its config, as decoders differ in last bits.

Shape suffixes: B batch, H W the crop, C channels (RGB).
"""

import contextlib
import importlib
import io
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from saltern.pipeline.shards.decode import MAX_PIXELS, Cut, Decoded, DecodeError, decode, from_pixels
from saltern.pipeline.shards.jpeg import plain_frame
from saltern.pipeline.shards.sources import Data
from saltern.schemas.choices import Decode, check_choice
from saltern.schemas.config import PILLOW, Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side, shape_of

version = cache(metadata.version)  # each call parses the description of a package
_NVJPEG = "nvjpeg"  # begins the names of decoders on a GPU

with warnings.catch_warnings():  # torch says once that bytes cannot be written to; nothing here does
    warnings.simplefilter("ignore")
    torch.frombuffer(b"once", dtype=torch.uint8)


@dataclass(slots=True)
class DecodedBatch:
    """Decoded images, one slot for each file in order. The slots of files with a problem are undefined.

    Pixels on a GPU are complete when the decoder returns. They were allocated on the decoder's stream: the thread that
    uses them calls `pixels_BHWC.record_stream(torch.cuda.current_stream())` first.
    """

    pixels_BHWC: Tensor  # noqa: N815 - uint8
    size_B2: NDArray[np.int32]  # noqa: N815 - height and width of the upright original, pixels
    geometry_B4: NDArray[np.float64]  # noqa: N815 - as Decoded.geometry
    problems: dict[int, tuple[str, str]]  # status and reason, by position


class Decoder(Protocol):
    """A decoder, called by several threads on slices of a batch; on a GPU by one thread on whole batches."""

    name: str  # with the version, as the config has it
    device: torch.device  # of the pixels

    def __call__(self, images: Sequence[Data], cuts: Sequence[Cut] | None = None) -> DecodedBatch:
        """Decode image files. A bad image is a problem in the result, not an error.

        Args:
            images: the files.
            cuts: one for each image, in place of the preprocess's resize, crop and squash.
        """


def choose_decoder(choice: str, device: str, existing: str | None = None) -> str:
    """Return the name of the decoder that a run uses.

    Args:
        choice: auto | cpu | gpu.
        device: of the workers: cpu | cuda.
        existing: decoder of the existing run, which keeps it unless the choice excludes it.

    Raises:
        UserError: the choice is gpu, and the device is none or has no nvJPEG.
    """
    check_choice("--decode", choice, Decode)
    if existing is not None and choice in ("auto", "gpu" if existing.startswith(_NVJPEG) else "cpu"):
        return existing
    if choice == "gpu" and device != "cuda":
        raise UserError("--decode gpu decodes on the GPU that computes: it needs --device cuda")
    if choice == "cpu" or device != "cuda":
        return CpuDecoder(Preprocess(), decode_jpeg()).name
    found = next(iter(nvjpegs()), None)
    if found is None and choice == "gpu":
        raise UserError("--decode gpu: no nvJPEG works here; install torchcodec for this torch, or give --decode cpu")
    return found or choose_decoder("cpu", device)


def describe_decoder(name: str, device: str) -> list[str]:
    """Return a line for the user if the workers have a GPU, on which decoding decides the rate."""
    where = "the GPU" if name.startswith(_NVJPEG) else "the CPU, which may be slower than the GPU's method"
    return [f"JPEG files are decoded by {name} on {where}"] if device == "cuda" else []


def make_decoder(preprocess: Preprocess, name: str | None = None, device: str = "cpu", threads: int = 1) -> Decoder:
    """Return a decoder.

    Args:
        preprocess: its resize, crop, squash and interpolation are used.
        name: as `choose_decoder` gives it; `pillow` is Pillow of any version. None: the best on a CPU.
        device: of the worker: cpu | cuda, or cuda:1 for one of several GPUs.
        threads: of a GPU decoder, for the files that the CPU decodes.

    Raises:
        UserError: there is no such decoder here.
    """
    on_cpu = [CpuDecoder(preprocess, decode_jpeg()), CpuDecoder(preprocess)]
    for decoder in on_cpu:
        if name in (None, decoder.name) or (name == PILLOW and decoder is on_cpu[-1]):
            return decoder
    on_gpu = torch.device(device).type == "cuda"
    gpu = nvjpegs() if on_gpu and str(name).startswith(_NVJPEG) else {}
    if name in gpu:
        from saltern.pipeline.shards.nvjpeg import GpuDecoder  # imports this file

        return GpuDecoder(on_cpu[0], gpu[name], name, torch.device(device), threads)
    here = ", ".join([*gpu, *dict.fromkeys(decoder.name for decoder in on_cpu)])
    raise UserError(
        f"the run's images are decoded by {name}, and {socket.gethostname()} has {here} on {device}: install that "
        "version on each machine, or give another --out for a run with another decoder (--decode cpu)"
    )


def nvjpegs() -> dict[str, Callable[[list[Tensor]], list[Tensor]]]:
    """Return the functions that call nvJPEG here, by name, the preferred first.

    Each is tried if this machine has a GPU. On others, such as the head of a cluster, those that are installed.
    """
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as by_torchvision

    functions: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {}
    by_torchcodec = decode_jpeg()
    if by_torchcodec is not None:
        functions["torchcodec"] = partial(by_torchcodec, mode="RGB", device="cuda")
    functions["torchvision"] = partial(by_torchvision, mode=ImageReadMode.RGB, device="cuda")
    return {
        f"{_NVJPEG} ({package} {version(package)})": function
        for package, function in functions.items()
        if not torch.cuda.is_available() or _works(function)
    }


def _works(function: Callable[[list[Tensor]], list[Tensor]]) -> bool:
    made = io.BytesIO()
    Image.new("RGB", (16, 16)).save(made, "JPEG")
    with contextlib.suppress(RuntimeError, NotImplementedError, OSError):
        return function([as_tensor(made.getvalue())])[0].shape == (3, 16, 16)
    return False


def decode_jpeg() -> Callable[..., Any] | None:
    """Return torchcodec's function; None if it is not installed, or not for this torch."""
    try:
        return importlib.import_module("torchcodec.decoders").decode_jpeg  # type: ignore[no-any-return]
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None


class CpuDecoder:
    """A decoder of one image after the other. Its pixels are Pillow's.

    Args:
        preprocess: its resize, crop, squash and interpolation are used.
        plain: decodes plain JPEG files faster, as torchcodec's decode_jpeg does; None: Pillow decodes them too.
    """

    device = torch.device("cpu")

    def __init__(self, preprocess: Preprocess, plain: Callable[..., Any] | None = None):
        package = PILLOW if plain is None else "torchcodec"
        self.name = f"{package} {version(package)}"
        self.preprocess, self._plain = preprocess, plain

    def __call__(self, images: Sequence[Data], cuts: Sequence[Cut] | None = None) -> DecodedBatch:
        batch = empty_batch(len(images), self.preprocess.crop)
        pixels_BHWC = batch.pixels_BHWC.numpy()
        for position, data in enumerate(images):
            try:
                decoded = self._decode(data, None if cuts is None else cuts[position])
            except DecodeError as error:
                batch.problems[position] = error.status, error.reason
                continue
            pixels_BHWC[position] = decoded.pixels_HWC
            batch.size_B2[position] = decoded.image_height, decoded.image_width
            batch.geometry_B4[position] = decoded.geometry
        return batch

    def _decode(self, data: Data, cut: Cut | None) -> Decoded:
        frame = None if self._plain is None else plain_frame(data)
        if self._plain is not None and frame is not None and frame.height * frame.width <= MAX_PIXELS:
            with contextlib.suppress(RuntimeError, MemoryError):  # Pillow decodes it, or says what is wrong
                pixels_CHW: Tensor = self._plain(as_tensor(data), mode="RGB")
                return from_pixels(pixels_CHW.permute(1, 2, 0).contiguous().numpy(), self.preprocess, cut)
        return decode(bytes(data), self.preprocess, cut)  # Pillow would copy it too


def as_tensor(data: Data) -> Tensor:
    """Return the bytes as a tensor, without a copy. It must not be written to."""
    return torch.frombuffer(data, dtype=torch.uint8)


def empty_batch(number: int, crop: Side, device: torch.device | None = None) -> DecodedBatch:
    """Return a batch of undefined slots."""
    pixels_BHWC = torch.empty((number, *shape_of(crop), 3), dtype=torch.uint8, device=device)
    return DecodedBatch(pixels_BHWC, np.zeros((number, 2), np.int32), np.zeros((number, 4)), {})
