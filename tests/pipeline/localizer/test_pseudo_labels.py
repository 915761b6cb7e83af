"""The labels of a run, as stored, and as they lie in random crops."""

import numpy as np
import pytest
import torch
from localizer_toys import naive_targets
from made_run import CROP, make_run

from saltern.pipeline.localizer.labels import CELLS, make_labels, targets
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.errors import UserError


@pytest.mark.parametrize("kind", ["maps", "masks", "boxes"])
def test_the_labels_are_those_of_the_run_s_ok_rows(kind, tmp_path):
    made = make_run(tmp_path, targets=2, broken=((1, 2),))
    run = open_run(str(made.path))
    index, labels, digest = make_labels(run, kind, tmp_path)
    samples = [(shard, sample) for shard in run.shards for sample in read_samples(shard)]
    samples = [(shard, sample) for shard, sample in samples if sample.image != b"no image"]
    assert len(index) == labels.count == len(samples) == 14
    grid_Bhw, box_B4, geometry_B4 = labels.read(torch.arange(14))
    for number, (shard, sample) in enumerate(samples):
        row = run.rows(sample.key)[0]
        with open(shard.url, "rb") as tar:
            tar.seek(index.offset_N[number])
            assert tar.read(index.size_N[number]) == sample.image
        assert box_B4[number].tolist() == row.boxes[0]
        assert geometry_B4[number].tolist() == pytest.approx(row.geometry)
        if kind == "maps":
            map_hw = made.maps[shard.name, sample.key, 0]
            unit = (map_hw - map_hw.min()) / (map_hw.max() - map_hw.min())
            assert np.abs(grid_Bhw[number].numpy() / 255 - unit).max() <= 0.5 / 255 + 1e-6
        elif kind == "masks":
            assert np.array_equal(grid_Bhw[number].numpy() == 255, made.masks[shard.name, sample.key, 0])
    assert make_labels(run, kind, tmp_path)[2] == digest
    assert {path.name for path in tmp_path.glob("*labels*")} == {labels.path.name}


def test_fine_labels_are_kept_on_a_coarse_grid(tmp_path):
    made = make_run(tmp_path, shards=1, grid=(2 * CELLS, 2 * CELLS))
    _, labels, _ = make_labels(open_run(str(made.path)), "maps", tmp_path)
    map_hw = made.maps["part0/train", "s0k0", 0]
    unit = (map_hw - map_hw.min()) / (map_hw.max() - map_hw.min())
    means = unit.reshape(CELLS, 2, CELLS, 2).mean((1, 3))
    assert np.abs(labels.read(torch.tensor([0]))[0][0].numpy() / 255 - means).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("kind", ["maps", "masks", "boxes"])
def test_targets_follow_the_crop_cell_by_cell(kind):
    """Crops that are mirrored, that leave the run's input, and that cut the box."""
    draw = np.random.default_rng(7)
    grid = draw.integers(0, 256, (4, 5, 6), dtype=np.uint8)
    box = np.array([[10, 12, 50, 40], [0, 0, 9, 9], [30, 5, 60, 44], [2, 3, 59, 43]], np.float32)
    geometry = np.array([[1.25, 1.25, 8, 0]] * 4, np.float32)
    crop = np.array([[30, 20, 15, 10], [-25, 30, 40, 5], [60, 44, 0, 0], [-60, 44, 60, 0]], np.float32)
    found = targets(kind, CROP, *map(torch.from_numpy, (grid, box, geometry, crop)), 8)
    for image in range(4):
        mask, known = naive_targets(kind, grid[image] / 255, box[image], geometry[image], CROP, crop[image], 8)
        assert np.array_equal(found.known_Bgg[image].numpy(), known)
        assert np.abs((found.mask_Bgg[image].numpy() - mask) * known).max() < 1e-5


def test_a_run_without_maps_is_refused(tmp_path):
    made = make_run(tmp_path, save_map=False)
    with pytest.raises(UserError, match=r"was made with --no-map: give --labels masks or --labels boxes"):
        make_labels(open_run(str(made.path)), "maps", tmp_path)


def test_a_run_without_an_ok_row_is_refused(tmp_path):
    made = make_run(tmp_path, shards=1, samples=1, broken=((0, 0),))
    with pytest.raises(UserError, match="has no row to learn from"):
        make_labels(open_run(str(made.path)), "masks", tmp_path)
