"""The data of a training: its index, its batches, its crops."""

import io
import os
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import skimage.data
import torch
from casm_toys import SIDE
from making import picture, write_tar
from PIL import Image

from saltern.pipeline.shards.decode import from_pixels
from saltern.pipeline.shards.decoder import CpuDecoder, decode_jpeg, make_decoder
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.nvjpeg import GpuDecoder
from saltern.pipeline.shards.resample import resample_regions
from saltern.pipeline.shards.samples import read_samples
from saltern.pipeline.training import batches as module
from saltern.pipeline.training.batches import Batches, crop_box, random_cut
from saltern.pipeline.training.index import make_index
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import ShardError

PREPROCESS = Preprocess(SIDE, SIDE)
DECODER = make_decoder(PREPROCESS)


def on_gpu(calls: list[int] | None = None) -> GpuDecoder:
    """Return a decoder of a GPU, with torchcodec's CPU function for nvJPEG. It notes the images of each call."""
    plain = partial(decode_jpeg(), mode="RGB")

    def decode(images: list[torch.Tensor]) -> list[torch.Tensor]:
        if calls is not None:
            calls.append(len(images))
        return plain(images)

    return GpuDecoder(CpuDecoder(PREPROCESS, decode_jpeg()), decode, "nvjpeg (test)", torch.device("cpu"), 2)


def naive_pixels(data: bytes, seed: int, place: int, min_crop: float = 0.08) -> np.ndarray:
    """Return the random crop of an image file, by Pillow."""
    image, draw = Image.open(io.BytesIO(data)).convert("RGB"), random.Random(f"casm {seed} {place} crop")
    left, top, width, height = crop_box(image.width, image.height, draw, min_crop)
    pixels_HWC = np.array(image.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.BILINEAR))
    return pixels_HWC[:, ::-1] if draw.random() < 0.5 else pixels_HWC


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
    batches = Batches(index, 5, DECODER, seed=2)  # 24 samples: a batch reaches over from one pass into the next
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


@pytest.mark.slow  # imports torchvision
def test_a_crop_is_torchvisions():
    """The pixels of one box are equal; areas, ratios and places of many boxes have the same distribution."""
    from torchvision.transforms import v2

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 110, 3), dtype=np.uint8))
    flips = 0
    for seed in range(20):
        left, top, width, height = crop_box(110, 70, random.Random(str(seed)))
        cut = partial(random_cut, str(seed), 0.08)
        found = from_pixels(np.asarray(image), Preprocess(48, 48), cut).pixels_HWC
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


@pytest.mark.parametrize("decoder", [DECODER, make_decoder(PREPROCESS, "pillow")], ids=["torchcodec", "pillow"])
def test_the_pixels_of_a_cpu_are_pillows(shards, decoder):
    index = make_index(expand([str(shards)])[0], 6)
    batches = Batches(index, 6, decoder, seed=3)
    for step in (0, 5):
        batch = batches.read(step)
        for slot, place in enumerate(range(6 * step, 6 * step + 6)):
            number = batches._number(place)
            assert np.array_equal(batch.pixels_BHWC[slot], naive_pixels(batches._bytes(number), 3, place))
            assert batch.label_B[slot] == index.label_N[number]


def test_crops_and_flips_on_a_device_are_those_of_the_cpu(tmp_path):
    """docs/casm.md states the bound."""
    samples = [(f"k{i}", {"jpg": picture(i, 90 + 40 * i, 260 - 9 * i), "cls": str(i)}) for i in range(12)]
    samples[5] = ("k5", {"png": picture(5, kind="PNG"), "cls": "5"})
    samples[7] = ("k7", {"jpg": b"no image", "cls": "7"})
    write_tar(tmp_path / "a.tar", samples)
    index, calls = make_index(expand([str(tmp_path)])[0], 12), []
    cpu, gpu = (Batches(index, 12, decoder, seed=4, threads=2) for decoder in (DECODER, on_gpu(calls)))
    for expected, found in zip(cpu.run(0, 4), gpu.run(0, 4), strict=True):
        assert torch.equal(found.label_B, expected.label_B)
        assert found.damaged == expected.damaged == 1
        off = (found.pixels_BHWC.int() - expected.pixels_BHWC.int()).abs()
        assert off.max() <= 2
        assert off.float().mean() < 0.1
    assert calls.count(10) == 4  # a batch is decoded in one call, but for the PNG file and the damaged one


def test_mirrored_crops_of_any_shape_are_pillows_on_a_device():
    image_HWC = np.array(Image.fromarray(skimage.data.chelsea()).resize((160, 90)))
    regions = [random_cut(str(seed), 0.02, 160, 90) for seed in range(60)]
    regions += [((x, y, x + w, y + h), (w, 0, 0, h)) for x, y, w, h in ((0, 0, 160, 90), (7, 9, 1, 1), (3, 0, 2, 90))]
    assert 20 < sum(box[0] > box[2] for _, box in regions) < 43
    for interpolation in ("bilinear", "bicubic"):
        how = Preprocess(SIDE, SIDE, False, interpolation)
        planar = torch.from_numpy(image_HWC).permute(2, 0, 1)
        found = resample_regions([planar] * len(regions), regions, how).numpy().astype(int)
        for pixels_HWC, region in zip(found, regions, strict=True):
            expected = from_pixels(image_HWC, how, lambda width, height, region=region: region).pixels_HWC
            assert np.abs(pixels_HWC - expected).max() <= 2, region


def test_many_damaged_images_in_a_row_end_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_DAMAGED_IN_A_ROW", 3)
    bad = {1, 2, 5, 6, 7}
    samples = [(f"k{i}", {"jpg": b"no image" if i in bad else picture(i), "cls": "0"}) for i in range(8)]
    write_tar(tmp_path / "a.tar", samples)
    index = make_index(expand([str(tmp_path)])[0], 1)
    monkeypatch.setattr(Batches, "_number", lambda self, place: place)
    for decoder in (DECODER, on_gpu()):
        assert Batches(index, 5, decoder).read(0).damaged == 2 + 1
        with pytest.raises(ShardError, match="3 images in a row cannot be decoded"):
            Batches(index, 3, decoder)._samples([4, 5])


@pytest.mark.parametrize("decoder", [DECODER, on_gpu()], ids=["cpu", "gpu"])
def test_a_damaged_image_is_passed_over_and_counted(tmp_path, decoder):
    samples = [(f"k{i}", {"jpg": b"no image" if i == 2 else picture(i), "cls": str(i)}) for i in range(4)]
    write_tar(tmp_path / "a.tar", samples)
    batch = Batches(make_index(expand([str(tmp_path)])[0], 6), 4, decoder).read(0)
    assert batch.damaged == 1
    assert sorted(batch.label_B.tolist()) == [0, 1, 3, 3]


def test_a_tar_that_is_written_again_ends_the_training(tmp_path):
    tar = write_tar(tmp_path / "x.tar", ((f"k{i}", {"jpg": picture(i), "cls": "0"}) for i in range(4)))
    batches = Batches(make_index(expand([str(tar)])[0], 1), 2, DECODER, seed=0)
    batches.read(0)
    content, before = tar.read_bytes(), tar.stat().st_mtime_ns
    tar.write_bytes(content)
    os.utime(tar, ns=(before, before + 10**9))
    with pytest.raises(ShardError, match="changed since the training began"):
        batches.read(1)
