"""Inputs that several tests need: synthetic photographs, shards, runs, a small network."""

import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

Members = Mapping[str, bytes | str]  # extension -> content
HELPERS = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(HELPERS), str(HELPERS.parents[1] / "src")])  # of commands that tests start


def picture(seed: int, height: int = 60, width: int = 80, kind: str = "JPEG") -> bytes:
    """Return a smooth colour picture as an encoded file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[str, Members]]) -> Path:
    """Write a tar of (key, members), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                raw = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return path


def write_shard(path: Path, count: int, start: int = 0) -> Path:
    """Write a shard of `count` good samples with labels 0..4."""
    made = range(start, start + count)
    return write_tar(path, ((f"k{i:05}", {"jpg": picture(i), "cls": str(i % 5)}) for i in made))


def write_shards(folder: Path, shards: int, each: int) -> Path:
    for shard in range(shards):
        write_shard(folder / f"part-{shard:06}.tar", each, shard * each)
    return folder


class Tiny(nn.Module):
    """A fast network: five classes, two convolutions, a grid an eighth of the input. Its maps differ by class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x_BCHW).mean((2, 3)))
        return logits


def tiny() -> nn.Module:
    """Return the network of `--model making:tiny`. Its weights depend only on the seed."""
    return Tiny().eval()


# A user's own module: `--model nets:small --layer 1`. Processes that load it need no torchvision, which takes seconds.
OWN_NET = """
import torch


def small():
    torch.manual_seed(0)
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), pooled, torch.nn.Linear(4, 5)).eval()
"""

TINY = ("--model", "making:tiny", "--layer", "body", "--resize", "40", "--crop", "32", "--device", "cpu")


def files(root: Path) -> dict[str, bytes]:
    """Return the data files of a run, by name."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("data/**/*.parquet"))}
