"""Runs with known maps and masks, written by the real writer with the real schema."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from making import Members, picture, write_tar
from naive_rows import original_box
from numpy.typing import NDArray

from saltern.pipeline.maps.discretize import discretize, largest_box, upsample
from saltern.pipeline.maps.encode import pack_mask, quantise
from saltern.pipeline.runs.columns import Record, from_records
from saltern.pipeline.runs.datafile import data_schema
from saltern.pipeline.runs.manifest import data_name, receipt_name
from saltern.pipeline.runs.writer import ShardWriter
from saltern.pipeline.shards.decode import decode
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import ExtractConfig, config_from_dict
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Run, Shard
from saltern.schemas.saliency import DECODE_FAILED, OK

CROP = 32
SIZE = (44, 60)  # height and width of the photographs


def config(**changes: Any) -> ExtractConfig:
    """Return a config with changes, by the keys of run.json."""
    made: dict[str, Any] = {
        "model": "resnet18", "weights": "none", "weights_digest": "0" * 64, "classes": 10, "method": "grad-cam",
        "layer": ["layer4"], "options": {}, "target": "label", "discretize": "mean:1", "map_size": "native",
        "map_dtype": "float32", "save_map": True, "resize": 40, "crop": CROP, "squash": False,
        "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3, "precision": "fp32", "seed": 0, "limit": None,
        "batch_size": 4, "torch_threads": 1,
    }  # fmt: skip
    config = config_from_dict(made | changes)
    assert isinstance(config, ExtractConfig)
    return config


@dataclass
class Made:
    """A run and its expected content, by shard name, key and position among the sample's targets."""

    path: Path
    run: Run
    maps: dict[tuple[str, str, int], NDArray[np.float32]] = field(default_factory=dict)
    masks: dict[tuple[str, str, int], NDArray[np.bool_]] = field(default_factory=dict)

    def data(self, shard: int) -> Path:
        return self.path / data_name(self.run.shards[shard].name)


def make_run(
    folder: Path,
    *,
    shards: int = 3,
    samples: int = 5,
    targets: int = 1,
    grid: tuple[int, int] = (4, 4),
    broken: tuple[tuple[int, int], ...] = (),
    json: bytes | None = None,
    class_names: list[str] | None = None,
    **changes: Any,
) -> Made:
    """Make a run in `folder`/run over tars in `folder`/shards. Keys are unique in the run.

    Args:
        shards, samples: number of shards, and of samples in each.
        broken: (shard, sample) whose image member is not an image.
        json: the samples' json member.
        class_names: the model's.
        changes: to the config.
    """
    wanted = []
    for number in range(shards):
        samples_: dict[str, Members] = {}
        for index in range(samples):
            key = f"s{number}k{index}"
            image = b"no image" if (number, index) in broken else picture(index, *SIZE)
            samples_[key] = {"jpg": image, "cls": str(index).encode()} | ({} if json is None else {"json": json})
        tar = folder / "shards" / f"part{number}" / "train.tar"
        write_tar(tar, samples_.items())
        wanted.append(Shard(f"part{number}/train", str(tar), tar.stat().st_size))
    frozen = config(**changes)
    made = Made(folder / "run", Run(frozen, wanted, {"saltern": "0"}, frozen.fingerprint(), class_names))
    made.path.mkdir()
    (made.path / "run.json").write_bytes(made.run.to_json())
    for number in range(shards):
        rows: list[Record] = []
        for index in range(samples):
            key = f"s{number}k{index}"
            if (number, index) in broken:
                failed = {"key": key, "shard": wanted[number].name, "index": index, "label": index}
                rows.append({**failed, "status": DECODE_FAILED, "error": "no image"})
            else:
                rows += [_row(made, wanted[number].name, key, index, t, grid) for t in range(targets)]
        write_shard(made, number, samples, rows, grid)
    return made


def _row(made: Made, shard: str, key: str, index: int, target: int, grid: tuple[int, int]) -> Record:
    cfg = made.run.config_of(ExtractConfig)
    seed = int.from_bytes(key.encode()[-6:]) + target
    map_1hw = torch.rand(1, *grid, generator=torch.Generator().manual_seed(seed)) * 3 - 1
    mask_1HW, threshold = discretize(upsample(map_1hw, (CROP, CROP)), cfg.discretize)
    stored, lo, hi = quantise(map_1hw, cfg.map_dtype, heavy_tailed=False)
    decoded = decode(picture(index, *SIZE), cfg.preprocess)
    box = largest_box(mask_1HW[0].numpy())
    assert box is not None
    made.maps[shard, key, target] = map_1hw[0].numpy()
    made.masks[shard, key, target] = mask_1HW[0].numpy()
    record: Record = {
        "key": key, "shard": shard, "index": index, "label": index, "predicted": (index + 1) % 10,
        "target": (index + target) % 10, "score": 1 / (1 + index + target),
        "mask": pack_mask(mask_1HW).numpy().tobytes(), "mask_threshold": float(threshold),
        "mask_area": float(mask_1HW.float().mean()),
        "boxes": [original_box(box, decoded.geometry, decoded.image_height, decoded.image_width)],
        "image_height": decoded.image_height, "image_width": decoded.image_width, "geometry": list(decoded.geometry),
        "status": OK,
    }  # fmt: skip
    if cfg.save_map:
        record |= {"map": stored.numpy().tobytes(), "map_height": grid[0], "map_width": grid[1]}
        if cfg.map_dtype == "uint8":
            record |= {"map_lo": float(lo), "map_hi": float(hi)}
    return record


def write_shard(made: Made, number: int, samples: int, rows: list[Record], grid: tuple[int, int]) -> None:
    """Write a data file and its receipt."""
    shard, cfg = made.run.shards[number], made.run.config_of(ExtractConfig)
    measured = {"map_shape": list(grid) if cfg.save_map else None, "map_clip_quantile": None}
    store = Store(str(made.path))
    schema = data_schema(made.run, measured)
    with ShardWriter(made.path, schema) as writer:
        writer.write(from_records(rows, schema))
        written = writer.close()
    store.move(written.path.name, data_name(shard.name))
    statuses = dict(Counter(row["status"] for row in rows))
    receipt = Receipt(
        shard.name, shard.size, made.run.fingerprint, samples, len(rows), statuses, written.digest, written.size, {}
    )
    store.write(receipt_name(shard.name), receipt.to_json())
