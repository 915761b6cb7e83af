"""The data of a training: its index, its batches, its crops."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from casm_toys import SIDE
from making import picture, write_tar
from PIL import Image
from torchvision.transforms import v2

from saltern.pipeline.casm.data.batches import Batches, crop, crop_box
from saltern.pipeline.casm.data.index import make_index
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.errors import ShardError


def test_index_finds_the_images_and_labels_of_the_shards(shards):
    found, _ = expand([str(shards)])
    index = make_index(found, 6)
    samples = [sample for shard in found for sample in read_samples(shard)]
    assert index.label_N.tolist() == [sample.label for sample in samples]
    for number, sample in enumerate(samples):
        with open(found[index.shard_N[number]].url, "rb") as tar:
            tar.seek(index.offset_N[number])
            assert tar.read(index.size_N[number]) == sample.image


def test_index_takes_the_classes_in_play_in_their_order(shards):
    found, _ = expand([str(shards)])
    whole, some = make_index(found, 6), make_index(found, 6, [4, 1])
    kept = [[4, 1].index(label) for label in whole.label_N.tolist() if label in (4, 1)]
    assert some.label_N.tolist() == kept
    assert 0 < len(some) < len(whole)


def test_a_batch_follows_from_its_number_in_any_order_and_over_any_ranks(shards):
    index = make_index(expand([str(shards)])[0], 6)
    batches = Batches(index, 5, SIDE, seed=2)  # 24 samples: a batch reaches over from one pass into the next
    row = list(batches.run(0, 12))
    for step in (11, 3, 4):
        alone = batches.read(step)
        assert torch.equal(alone.pixels_BHWC, row[step].pixels_BHWC)
        assert torch.equal(alone.label_B, row[step].label_B)
    batches = replace(batches, batch_size=6)
    parts = [replace(batches, rank=rank, world=2).read(7) for rank in range(2)]
    assert torch.equal(torch.cat([part.pixels_BHWC for part in parts]), batches.read(7).pixels_BHWC)
    labels = torch.cat([batches.read(step).label_B for step in range(8)])
    first, second = labels[:24], labels[24:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(index.label_N.tolist())  # each once a pass
    assert first.tolist() != second.tolist()
    assert not torch.equal(batches.read(0).pixels_BHWC, replace(batches, seed=3).read(0).pixels_BHWC)


def test_a_crop_is_torchvisions():
    """The pixels of one box are equal; areas, ratios and places of many boxes have the same distribution."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 110, 3), dtype=np.uint8))
    flips = 0
    for seed in range(20):
        left, top, width, height = crop_box(110, 70, random.Random(seed))
        found = crop(image, 48, "bilinear", random.Random(seed))
        expected = np.asarray(v2.functional.resized_crop(image, top, left, height, width, [48, 48]))
        mirrored = not np.array_equal(found, expected)
        assert np.array_equal(found[:, ::-1] if mirrored else found, expected)
        flips += mirrored
    assert 4 <= flips <= 16
    theirs, draw = v2.RandomResizedCrop(48), random.Random(1)
    expected = np.array([list(theirs.make_params([image]).values()) for _ in range(4000)], float)  # top left h w
    found = np.array([crop_box(110, 70, draw) for _ in range(4000)], float)[:, [1, 0, 3, 2]]
    np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=1.5)
    np.testing.assert_allclose(found.std(0), expected.std(0), atol=1.5)
    areas = [width * height for _, _, width, height in (crop_box(110, 70, draw, 0.5) for _ in range(500))]
    assert 0.49 * 7700 < min(areas) < 0.53 * 7700
    left, top, width, height = crop_box(500, 10, random.Random(0))  # no crop fits: the centre
    assert (left, top, width, height) == (243, 0, 13, 10)


def test_a_damaged_image_is_passed_over_and_counted(tmp_path):
    samples = [(f"k{i}", {"jpg": b"no image" if i == 2 else picture(i), "cls": str(i)}) for i in range(4)]
    write_tar(tmp_path / "a.tar", samples)
    batch = Batches(make_index(expand([str(tmp_path)])[0], 6), 4, SIDE).read(0)
    assert batch.damaged == 1
    assert sorted(batch.label_B.tolist()) == [0, 1, 3, 3]


def test_a_tar_that_is_written_again_ends_the_training(tmp_path):
    tar = write_tar(tmp_path / "x.tar", ((f"k{i}", {"jpg": picture(i), "cls": "0"}) for i in range(4)))
    batches = Batches(make_index(expand([str(tar)])[0], 1), 2, SIDE, seed=0)
    batches.read(0)
    content, before = tar.read_bytes(), tar.stat().st_mtime_ns
    tar.write_bytes(content)
    os.utime(tar, ns=(before, before + 10**9))
    with pytest.raises(ShardError, match="changed since the training began"):
        batches.read(1)
