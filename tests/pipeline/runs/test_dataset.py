"""The torch dataset: each (sample, target) once over ranks and workers, in step with its image."""

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_run import CROP, SIZE, make_run
from making import picture, write_tar
from naive_rows import original_box
from torch import distributed
from torch.utils.data import DataLoader

from saltern.pipeline.maps.discretize import largest_box
from saltern.pipeline.runs.dataset import SaliencyDataset
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.shards.decode import decode
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.saliency import DECODE_FAILED

PREPROCESS = Preprocess(40, CROP)
# On a machine of few cores torch advises against so many workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def names(items: Any) -> list[tuple[str, int]]:
    return [(item["key"], int(item["target"])) for item in items]


def test_items_are_the_rows_with_their_images(tmp_path: Path) -> None:
    made = make_run(tmp_path, targets=2)
    run = open_run(str(made.path))
    items = list(SaliencyDataset(str(made.path)))
    assert len(items) == len(run) == 30
    for item, row in zip(items, run, strict=True):
        assert (item["key"], item["shard"], item["index"], item["status"]) == (
            row.key,
            row.shard,
            row.index,
            row.status,
        )
        assert [item[name] for name in ("label", "predicted", "target")] == [row.label, row.predicted, row.target]
        pixels = decode(picture(row.index, *SIZE), PREPROCESS).pixels_HWC
        assert item["image"].dtype == torch.uint8
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), pixels)
        assert torch.equal(item["map"], torch.from_numpy(row.map("input")))
        assert torch.equal(item["mask"], torch.from_numpy(row.mask()))
        # The geometry brings the mask's own box to the stored one.
        box = original_box(
            largest_box(item["mask"].numpy()), tuple(item["geometry"].tolist()), *item["image_size"].tolist()
        )
        assert item["box_input"].tolist() == list(largest_box(item["mask"].numpy()))
        assert item["has_box"]
        assert item["box"].tolist() == box == row.boxes[0]


def test_batches_collate(tmp_path: Path) -> None:
    made = make_run(tmp_path, broken=((0, 1),))
    batch = next(iter(DataLoader(SaliencyDataset(str(made.path), only_ok=False), batch_size=5)))
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "image": (5, 3, CROP, CROP), "map": (5, CROP, CROP), "mask": (5, CROP, CROP), "box": (5, 4), "has_box": (5,),
        "geometry": (5, 4), "image_size": (5, 2), "score": (5,), "label": (5,), "predicted": (5,), "target": (5,),
        "index": (5,), "box_input": (5, 4),
    }  # fmt: skip
    assert batch["has_box"].tolist() == [True, False, True, True, True]
    assert batch["status"][1] == DECODE_FAILED
    for name in ("image", "map", "mask", "box", "box_input", "geometry", "image_size"):
        assert not batch[name][1].any()
    assert (batch["target"][1], batch["label"][1], batch["score"][1].isnan()) == (-1, 1, True)


def test_only_ok_rows_by_default(tmp_path: Path) -> None:
    made = make_run(tmp_path, broken=((0, 1), (2, 4)))
    assert len(list(SaliencyDataset(str(made.path)))) == 13
    assert len(list(SaliencyDataset(str(made.path), only_ok=False))) == 15


def test_without_maps_the_items_have_none(tmp_path: Path) -> None:
    item = next(iter(SaliencyDataset(str(make_run(tmp_path, save_map=False).path))))
    assert "map" not in item
    assert item["mask"].any()


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (3, 0), (2, 2), (4, 3)])
def test_each_row_once_over_ranks_and_workers(tmp_path: Path, world: int, workers: int, shuffle: bool) -> None:
    made = make_run(tmp_path, shards=7, samples=2, targets=2)
    seen: Counter[tuple[str, int]] = Counter()
    for rank in range(world):
        dataset = SaliencyDataset(str(made.path), shuffle=shuffle, seed=3, rank=rank, world=world)
        seen.update(names(DataLoader(dataset, batch_size=None, num_workers=workers)))
    assert seen == Counter((row.key, row.target) for row in open_run(str(made.path)))


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    path = str(make_run(tmp_path, shards=6, samples=1).path)
    dataset = SaliencyDataset(path, shuffle=True, seed=1)
    first, second = names(dataset), names(dataset)  # each pass is the next epoch
    dataset.set_epoch(1)
    assert second == names(dataset)
    dataset.set_epoch(0)
    assert first == names(dataset) == names(SaliencyDataset(path, shuffle=True, seed=1))
    assert first != second
    assert sorted(first) == sorted(second) == names(SaliencyDataset(path))
    assert first != names(SaliencyDataset(path, shuffle=True, seed=2))


@pytest.mark.slow
def test_persistent_workers_see_the_next_epoch(tmp_path: Path) -> None:
    path = str(make_run(tmp_path, shards=6, samples=1).path)
    dataset = SaliencyDataset(path, shuffle=True)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2, 7, 8):
        if epoch == 7:
            dataset.set_epoch(epoch)
        alone = SaliencyDataset(path, shuffle=True)
        alone.set_epoch(epoch)
        assert names(loader) == names(alone)


def test_the_rank_is_that_of_torch_distributed(tmp_path: Path) -> None:
    path = str(make_run(tmp_path, shards=3, samples=1).path)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert len(list(SaliencyDataset(path))) == 3
    finally:
        distributed.destroy_process_group()
    for rank, world in [(1, 1), (-1, 2)]:
        with pytest.raises(UserError, match="ranks count from 0"):
            SaliencyDataset(path, rank=rank, world=world)


def test_a_tar_that_no_longer_fits_is_named(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=2)
    tar = Path(made.run.shards[0].url)
    size = tar.stat().st_size
    write_tar(tar, [(key, {"jpg": picture(index), "cls": b"0"}) for index, key in enumerate(["s0k0", "renamed"])])
    os.truncate(tar, size)
    with pytest.raises(
        ShardError, match=r"part0/train\.parquet does not fit .*'renamed' at 1.*'s0k1' at 1.*saltern verify"
    ):
        list(SaliencyDataset(str(made.path)))


def test_shards_are_read_as_they_are_needed(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=3)
    Path(made.run.shards[2].url).unlink()
    items = iter(SaliencyDataset(str(made.path)))
    assert len(list(itertools.islice(items, 10))) == 10
    with pytest.raises(FileNotFoundError, match="part2"):
        next(items)
