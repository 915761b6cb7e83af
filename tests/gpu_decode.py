"""Compare decoding on a GPU with the CPU's, and measure its rate. One line for each check; exit code 1 if one fails.

    PYTHONPATH=src:tests/helpers python tests/gpu_decode.py [FOLDER OF TARS] [--seconds 60] [--json FILE]

It needs torch, torchvision and Pillow, and nothing else. Without a GPU, a decoder of the CPU takes nvJPEG's place.
"""

import argparse
import io
import json
import random
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from mutate import mutate_bytes
from PIL import Image

try:
    import pyarrow  # noqa: F401
except ImportError:  # such a machine decodes all the same
    sys.modules["pyarrow"] = MagicMock()

from saltern.pipeline.shards.decoder import CpuDecoder, as_tensor, decode_jpeg, nvjpegs
from saltern.pipeline.shards.nvjpeg import GpuDecoder
from saltern.schemas.config import Preprocess

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PREPROCESS, BATCH = Preprocess(), 128
MEAN, WORST = 1.0, 96  # levels; nvJPEG repeats the colours of 4:2:0 files where libjpeg interpolates them
RATE = 8000  # images/s


def by_pillow(images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Decode as nvJPEG's function does, on the CPU."""
    try:
        opened = [Image.open(io.BytesIO(image.numpy().tobytes())).convert("RGB") for image in images]
    except Exception as error:
        raise RuntimeError(str(error)) from error
    return [
        torch.frombuffer(bytearray(it.tobytes()), dtype=torch.uint8).view(it.height, it.width, 3).permute(2, 0, 1)
        for it in opened
    ]


def photographs(folder: Path) -> list[bytes]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


def batches(images: list[bytes]) -> list[list[bytes]]:
    return [images[first : first + BATCH] for first in range(0, len(images), BATCH)]


def against_cpu(decoder: GpuDecoder, images: list[bytes]) -> tuple[bool, dict[str, Any]]:
    """Compare the pixels of photographs."""
    cpu, means, worst, same = CpuDecoder(PREPROCESS, decode_jpeg()), [], 0, True
    for some in batches(images):
        found, expected = decoder(some), cpu(some)
        same &= found.problems == expected.problems
        same &= bool((found.size_B2 == expected.size_B2).all() and (found.geometry_B4 == expected.geometry_B4).all())
        off = (found.pixels_BHWC.cpu().int() - expected.pixels_BHWC.int()).abs()
        means.append(off.float().mean().item())
        worst = max(worst, int(off.max()))
    mean = sum(means) / len(means)
    return same and mean <= MEAN and worst <= WORST, {"mean": round(mean, 4), "max": worst, "images": len(images)}


def resampling(
    decode: Callable[[list[torch.Tensor]], list[torch.Tensor]], images: list[bytes]
) -> tuple[bool, dict[str, Any]]:
    """Compare the GPU's resampling with that of the CPU on the same decoded pixels."""
    from saltern.pipeline.shards.decode import from_pixels, geometry_of
    from saltern.pipeline.shards.resample import resample

    decoded = decode([as_tensor(image) for image in images[:BATCH]])
    geometries = [geometry_of(image.shape[2], image.shape[1], PREPROCESS) for image in decoded]
    found = resample(decoded, geometries, PREPROCESS).cpu()
    expected = [from_pixels(image.permute(1, 2, 0).contiguous().cpu().numpy(), PREPROCESS) for image in decoded]
    off = (found.int() - torch.stack([torch.from_numpy(it.pixels_HWC) for it in expected]).int()).abs()
    mean, worst = off.float().mean().item(), int(off.max())
    return mean < 0.05 and worst <= 2, {"mean": round(mean, 4), "max": worst}


def repeated(decoder: GpuDecoder, images: list[bytes]) -> tuple[bool, dict[str, Any]]:
    """Decode the same batches in two threads at once, and alone."""
    some = batches(images)[:4]
    alone = [decoder(batch).pixels_BHWC.cpu() for batch in some]
    with ThreadPoolExecutor(2) as threads:
        together = [batch.pixels_BHWC.cpu() for batch in threads.map(decoder, some * 4)]
    return all(torch.equal(one, alone[at % len(some)]) for at, one in enumerate(together)), {"batches": len(together)}


def damaged(decoder: GpuDecoder, images: list[bytes], seconds: float) -> tuple[bool, dict[str, Any]]:
    """Compare the statuses of damaged files. Half of the changes are in the header."""
    rng, cpu, found, wrong = random.Random(0), CpuDecoder(PREPROCESS), Counter[str](), []
    small = sorted(images, key=len)[:40]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        batch = []
        for _ in range(64):
            image, cut = rng.choice(small), rng.choice((700, None))
            batch.append(mutate_bytes(image[:cut], rng) + (image[cut:] if cut else b""))
        gpu, expected = decoder(batch).problems, cpu(batch).problems
        found["files"] += len(batch)
        found["failed"] += len(expected)
        wrong += [batch[at] for at in range(len(batch)) if gpu.get(at) != expected.get(at)]
    for number, data in enumerate(wrong[:20]):
        Path(f"wrong-{number}.jpg").write_bytes(data)
    return not wrong, {**found, "wrong": len(wrong)}


def rates(decoder: GpuDecoder, images: list[bytes]) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Measure images/s of whole batches in 1, 2 and 3 threads."""
    sizes, batches_each = ((64, 128, 256), 24) if DEVICE.type == "cuda" else ((8,), 4)
    for size in sizes:
        number = size * batches_each
        some = (images * (1 + number // len(images)))[:number]
        parts = [some[first : first + size] for first in range(0, len(some), size)]
        for count in (1, 2, 3):
            with ThreadPoolExecutor(count) as threads:
                list(threads.map(decoder, parts[: 2 * count]))
                since = time.perf_counter()
                list(threads.map(decoder, parts))
                rate = len(some) / (time.perf_counter() - since)
            enough = DEVICE.type == "cpu" or (size, count) != (128, 2) or rate >= RATE
            yield f"rate, batch {size}, {count} threads", enough, {"images_s": round(rate)}


def checks(images: list[bytes], seconds: float) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    functions: dict[str, Any] = nvjpegs() if DEVICE.type == "cuda" else {"pillow": by_pillow}
    yield "nvJPEG", bool(functions), {"functions": list(functions), "torch": torch.__version__}
    for name, decode in functions.items():
        rest = CpuDecoder(PREPROCESS, decode_jpeg())
        decoder = partial(GpuDecoder, rest, decode, name, DEVICE)(8)
        yield f"{name}: pixels against the CPU", *against_cpu(decoder, images)
        yield f"{name}: resampling", *resampling(decode, images)
        yield f"{name}: repeated", *repeated(decoder, images)
        yield f"{name}: damaged files", *damaged(decoder, images, seconds)
        for label, passed, figures in rates(decoder, images):
            yield f"{name}: {label}", passed, figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("../shared/data/imagenet-sample"))
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=30.0, help="for damaged files")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    images = photographs(given.folder)[: given.images]
    results = []
    for name, passed, figures in checks(images, given.seconds):
        print(
            f"{'ok  ' if passed else 'FAIL'} {name}: {', '.join(f'{key} {value}' for key, value in figures.items())}",
            flush=True,
        )
        results.append({"check": name, "passed": passed, **figures})
    if given.json:
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
        given.json.write_text(json.dumps({"device": device, "results": results}, indent=1))
    return int(not all(result["passed"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
