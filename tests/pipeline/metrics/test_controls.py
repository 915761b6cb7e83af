"""Controls are what they say, for each sample from its key and seed and from nothing else."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel
from torch import Tensor

from saltern.pipeline.metrics.controls import CONTROLS, control, sample_seeds
from saltern.pipeline.metrics.faithfulness.statistics import map_statistics


def pictures(samples: int = 3, height: int = 20, width: int = 32) -> Tensor:
    return torch.randint(256, (samples, height, width, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_sample_has_one_control_whatever_its_batch(name: str) -> None:
    pixels_BHWC, keys = pictures(), ["a", "b", "c"]
    map_BHW = control(name, pixels_BHWC, sample_seeds(0, keys))
    assert map_BHW.shape == (3, 20, 32)
    assert map_BHW.dtype == torch.float32
    assert map_BHW.is_contiguous()
    one_BHW = control(name, pixels_BHWC[1:2], sample_seeds(0, ["b"]))
    assert torch.equal(one_BHW[0], map_BHW[1])


def test_random_maps_are_uniform_and_follow_key_and_seed() -> None:
    pixels_BHWC = pictures(4, 64, 64)
    map_BHW = control("random", pixels_BHWC, sample_seeds(0, ["a", "b", "c", "a"]))
    assert torch.equal(map_BHW[0], map_BHW[3])
    assert not torch.equal(map_BHW[0], map_BHW[1])
    assert not torch.equal(map_BHW, control("random", pixels_BHWC, sample_seeds(1, ["a", "b", "c", "a"])))
    values = np.sort(map_BHW[:3].flatten().numpy())
    assert 0 <= values[0] <= values[-1] < 1
    assert np.abs(values - np.arange(len(values)) / len(values)).max() < 0.02  # Kolmogorov-Smirnov, 12,288 draws
    for shift in (1, 64):  # neighbours in a row and in a column
        flat_BN = map_BHW.flatten(1) - 0.5
        assert abs(float((flat_BN[:, shift:] * flat_BN[:, :-shift]).mean()) * 12) < 0.03
    assert float(map_statistics(map_BHW).entropy_B.min()) > 7.9


def test_the_blob_is_a_gaussian_at_the_centre() -> None:
    map_HW = control("centre-blob", pictures(), sample_seeds(0, ["a", "b", "c"]))[0]
    for y, x in ((0, 0), (9, 15), (10, 16), (4, 30)):
        exponent = ((y - 9.5) / 5) ** 2 / 2 + ((x - 15.5) / 8) ** 2 / 2
        assert float(map_HW[y, x]) == pytest.approx(math.exp(-exponent), rel=1e-5)


def test_edges_are_the_sobel_magnitude_of_the_grey_image() -> None:
    pixels_BHWC = pictures()
    found = control("edges", pixels_BHWC, sample_seeds(0, ["a", "b", "c"]))
    for at, pixels_HWC in enumerate(pixels_BHWC.numpy()):
        grey_HW = pixels_HWC @ np.array([0.299, 0.587, 0.114]) / 255
        magnitude_HW = np.hypot(sobel(grey_HW, 0, mode="nearest"), sobel(grey_HW, 1, mode="nearest"))
        np.testing.assert_allclose(found[at].numpy(), magnitude_HW, atol=1e-5)
    flat = torch.full((1, 5, 6, 3), 77, dtype=torch.uint8)
    assert not control("edges", flat, sample_seeds(0, ["a"])).any()


def test_box_and_whole_image() -> None:
    pixels_BHWC, seed_B = pictures(1, 100, 300), sample_seeds(0, ["a"])
    box_HW = control("centre-box", pixels_BHWC, seed_B)[0]
    assert float(box_HW.mean()) == pytest.approx(0.5, abs=0.01)
    assert set(box_HW.flatten().tolist()) == {0, 1}
    assert torch.equal(box_HW, box_HW.flip(0, 1))
    assert control("whole-image", pixels_BHWC, seed_B).eq(1).all()


def test_an_unknown_control_is_named() -> None:
    with pytest.raises(ValueError, match="'noise', not one of random, centre-blob, edges, centre-box, whole-image"):
        control("noise", pictures(), sample_seeds(0, ["a", "b", "c"]))
