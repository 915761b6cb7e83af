"""Decode batches of JPEG files on a GPU by nvJPEG; the CPU decodes all other files."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from saltern.pipeline.device import device_lost
from saltern.pipeline.shards.decode import MAX_PIXELS, Cut, Region, region_of
from saltern.pipeline.shards.decoder import CpuDecoder, DecodedBatch, as_tensor, empty_batch
from saltern.pipeline.shards.jpeg import Frame, plain_frame
from saltern.pipeline.shards.resample import resample_regions, send
from saltern.pipeline.shards.sources import Data

DecodeJpegs = Callable[[list[Tensor]], list[Tensor]]  # RGB, uint8, (C, H, W), on the device; raises RuntimeError


class GpuDecoder:
    """A decoder of whole batches. Each thread that calls it has a stream, and waits for its end.

    Two threads keep the GPU busy: one prepares files and resamples while nvJPEG works for the other.

    Args:
        rest: decodes on the CPU what nvJPEG does not: other formats, and JPEG files that are not simple or fail.
        decode_jpegs: nvJPEG's function.
        name: with the version.
        device: of the pixels.
        threads: for `rest`.
    """

    def __init__(self, rest: CpuDecoder, decode_jpegs: DecodeJpegs, name: str, device: torch.device, threads: int):
        self.name, self.device = name, device
        self._preprocess, self._rest, self._decode_jpegs = rest.preprocess, rest, decode_jpegs
        self._streams = threading.local()
        self._threads = ThreadPoolExecutor(threads, "saltern-decode-rest")

    def __call__(self, images: Sequence[Data], cuts: Sequence[Cut] | None = None) -> DecodedBatch:
        frames = {position: frame for position, data in enumerate(images) if (frame := _simple_frame(data)) is not None}
        rest = [position for position in range(len(images)) if position not in frames]

        def on_cpu(position: int) -> Future[DecodedBatch]:
            return self._threads.submit(self._rest, [images[position]], None if cuts is None else [cuts[position]])

        running = [on_cpu(position) for position in rest]
        with self._stream():
            batch = empty_batch(len(images), self._preprocess.crop, self.device)
            failed = [at for part in _parts(frames) for at in self._simple(batch, images, part, frames, cuts)]
            running += [on_cpu(position) for position in failed]
            for position, one in zip(rest + failed, running, strict=True):
                self._place(batch, position, one.result())
        return batch

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """Use this thread's stream, and wait for its end."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.own):
            yield
        self._streams.own.synchronize()

    def _simple(
        self,
        batch: DecodedBatch,
        images: Sequence[Data],
        positions: list[int],
        frames: dict[int, Frame],
        cuts: Sequence[Cut] | None,
    ) -> list[int]:
        """Decode simple files into their slots. Return the positions that failed, which are found by halving.

        A file that nvJPEG decodes fails too if its scan has a marker that does not belong there: libjpeg refuses it.
        """
        sizes = [(frames[position].width, frames[position].height) for position in positions]
        placed = [
            region_of(*size, self._preprocess, None if cuts is None else cuts[position])
            for size, position in zip(sizes, positions, strict=True)
        ]
        files = [as_tensor(images[position]) for position in positions]
        scans = [frames[position].scan for position in positions]
        made = self._try_out(files, scans, [region for _, region in placed])
        if made is None and len(positions) == 1:
            return positions
        if made is None:
            half = len(positions) // 2
            return [
                position
                for part in (positions[:half], positions[half:])
                for position in self._simple(batch, images, part, frames, cuts)
            ]
        pixels_BHWC, single = made
        batch.pixels_BHWC[send(torch.tensor(positions), self.device)] = pixels_BHWC
        batch.size_B2[positions] = [(height, width) for width, height in sizes]
        batch.geometry_B4[positions] = [geometry for geometry, _ in placed]
        return [position for position, alone in zip(positions, single, strict=True) if not alone]

    def _try_out(
        self, files: Sequence[Tensor], scans: Sequence[int], regions: Sequence[Region]
    ) -> tuple[Tensor, list[bool]] | None:
        """Return the input of each file, and whether its scan has no further marker; None if one of them fails.

        It holds nothing after a failure, which may be one of memory.
        """
        try:
            pixels_BHWC = resample_regions(self._decode_jpegs(list(files)), regions, self._preprocess)
            return pixels_BHWC, single_scans(files, scans, self.device).tolist()
        except RuntimeError as error:
            if device_lost(error):
                raise
        return None

    @staticmethod
    def _place(batch: DecodedBatch, position: int, one: DecodedBatch) -> None:
        if one.problems:
            batch.problems[position] = one.problems[0]
            return
        batch.pixels_BHWC[position] = send(one.pixels_BHWC[0], batch.pixels_BHWC.device)
        batch.size_B2[position], batch.geometry_B4[position] = one.size_B2[0], one.geometry_B4[0]


def single_scans(files: Sequence[Tensor], scans: Sequence[int], device: torch.device) -> Tensor:
    """Return for each file whether its end is the only marker in its scan, besides restarts: bool, on the device.

    Args:
        files: uint8, on the host. The last two bytes of each are the marker of the end.
        scans: where they begin, bytes.
        device: that compares. Python would take longer for it than for all else.
    """
    end_B = torch.tensor([len(file) for file in files]).cumsum(0)
    start_B = end_B - torch.tensor([len(file) - scan for file, scan in zip(files, scans, strict=True)])
    joined_N = torch.empty(int(end_B[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    byte_N = torch.cat(list(files), out=joined_N).to(device, non_blocking=True)
    next_N = byte_N[1:]
    marker_N = (byte_N[:-1] == 0xFF) & (next_N != 0) & ((next_N & 0xF8) != 0xD0)
    count_N = marker_N.cumsum(0, dtype=torch.int32)
    return count_N[send(end_B - 2, device)] - count_N[send(start_B - 1, device)] == 1


def _simple_frame(data: Data) -> Frame | None:
    """Return the frame of a file that nvJPEG decodes as libjpeg does."""
    frame = plain_frame(data)
    return frame if frame is not None and frame.height * frame.width <= MAX_PIXELS and frame.simple else None


def _parts(frames: dict[int, Frame]) -> Iterator[list[int]]:
    """Yield the positions in parts whose pixels fit in memory together."""
    part: list[int] = []
    pixels = 0
    for position, frame in frames.items():
        size = frame.height * frame.width
        if part and pixels + size > MAX_PIXELS:
            yield part
            part, pixels = [], 0
        part.append(position)
        pixels += size
    if part:
        yield part
