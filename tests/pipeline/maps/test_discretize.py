"""Thresholds equal slow float64 loops, components equal scipy's, boxes match their definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.filters import threshold_otsu
from torch import Tensor

from saltern.pipeline.maps.discretize import discretize, upsample
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Rule

RULES = [
    "mean", "mean:1", "mean:0.5", "mean:2", "mean-std", "mean-std:1", "mean-std:-0.5", "quantile", "quantile:0.75",
    "quantile:0", "quantile:1", "fixed", "fixed:0.2", "fixed:0", "fixed:1", "max", "max:0.2", "max:1",
    "fraction", "otsu",
]  # fmt: skip


def maps(seed: int = 0) -> Tensor:
    """Return six 24 x 31 maps: uniform, signed and large, tiny, heavy-tailed, half zeros, two plateaus."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(24, 31, generator=generator)
    signed = torch.randn(24, 31, generator=generator) * 1e3 - 700
    tiny = torch.rand(24, 31, generator=generator) * 1e-7
    heavy = (1.5 * torch.randn(24, 31, generator=generator)).exp()
    rectified = torch.randn(24, 31, generator=generator).relu()
    plateaus = torch.full((24, 31), -0.3)
    plateaus[4:20, 5:25] = 0.7
    plateaus[8:12, 8:20] = 1.9
    return torch.stack([uniform, signed, tiny, heavy, rectified, plateaus])


def order_statistic(unit: NDArray[np.float64], count: int) -> float:
    return sorted(unit.flatten().tolist(), reverse=True)[min(max(count, 1), unit.size) - 1]


def threshold_naive(unit: NDArray[np.float64], rule: str) -> float:
    """Return the threshold in [0, 1] of one map scaled to [0, 1]."""
    name, _, number = rule.partition(":")
    value = float(number or {"mean": 1, "mean-std": 0, "quantile": 0.9, "fixed": 0.5, "max": 0.5}.get(name, 0))
    values = unit.flatten().tolist()
    mean = math.fsum(values) / len(values)
    if name == "mean":
        return value * mean
    if name == "mean-std":
        return mean + value * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    if name == "quantile":
        return order_statistic(unit, round((1 - value) * unit.size))
    if name == "fraction":
        return order_statistic(unit, round(mean * unit.size))
    if name == "max":
        return value * max(values)
    if name == "otsu":
        return (int(threshold_otsu(np.round(unit * 255).astype(np.uint8))) + 0.5) / 255
    return value


@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_the_naive_loops(rule: str) -> None:
    map_BHW = maps()
    mask_BHW, threshold_B = discretize(map_BHW, Rule.parse(rule))
    assert mask_BHW.dtype == torch.bool
    assert threshold_B.dtype == torch.float32
    for map_HW, mask_HW, threshold in zip(map_BHW, mask_BHW, threshold_B, strict=True):
        values = map_HW.double().numpy()
        unit = (values - values.min()) / np.ptp(values)
        expected = threshold_naive(unit, rule)
        found = (float(threshold) - values.min()) / np.ptp(values)
        assert found == pytest.approx(expected, abs=2e-6)
        # Only pixels that equal the threshold up to rounding may differ.
        sure = np.abs(unit - expected) > 2e-6
        assert np.array_equal(mask_HW.numpy()[sure], (unit >= expected)[sure])


@pytest.mark.parametrize("rule", RULES)
def test_the_threshold_reproduces_the_mask_to_the_bit(rule: str) -> None:
    map_BHW = maps(1)
    mask_BHW, threshold_B = discretize(map_BHW, Rule.parse(rule))
    assert torch.equal(mask_BHW, map_BHW >= threshold_B[:, None, None])


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_equals_its_maps_one_by_one(rule: str) -> None:
    map_BHW = maps(2)
    mask_BHW, threshold_B = discretize(map_BHW, Rule.parse(rule))
    for b in range(len(map_BHW)):
        mask_1HW, threshold_1 = discretize(map_BHW[b : b + 1], Rule.parse(rule))
        assert torch.equal(mask_1HW[0], mask_BHW[b])
        assert torch.equal(threshold_1[0], threshold_B[b])


@pytest.mark.parametrize("rule", RULES)
def test_a_constant_map_is_chosen_whole(rule: str) -> None:
    mask_BHW, threshold_B = discretize(torch.tensor([3.25, -1.5, 0.0]).view(3, 1, 1).expand(3, 6, 7), Rule.parse(rule))
    assert mask_BHW.all()
    assert threshold_B.tolist() == [3.25, -1.5, 0.0]


@pytest.mark.parametrize("rule", ["max:1", "fixed:1", "quantile:0.9", "quantile:1"])
def test_a_plateau_is_never_lost_to_rounding(rule: str) -> None:
    """The maximum fills a quarter of each map, and in float32 lo + 1 * (hi - lo) often exceeds hi."""
    generator = torch.Generator().manual_seed(0)
    lo_B = torch.randn(200, generator=generator) - 2
    hi_B = lo_B + torch.rand(200, generator=generator) * 5
    map_BHW = lo_B.view(-1, 1, 1) + torch.rand(200, 20, 20, generator=generator) * 0.9 * (hi_B - lo_B).view(-1, 1, 1)
    map_BHW[:, 0, 0] = lo_B
    map_BHW[:, 5:15, 5:15] = hi_B.view(-1, 1, 1)
    mask_BHW, _ = discretize(map_BHW, Rule.parse(rule))
    assert mask_BHW.sum((1, 2)).tolist() == [100] * 200


def test_quantile_and_fraction_keep_so_many_pixels() -> None:
    map_BHW = torch.randn(8, 50, 40, generator=torch.Generator().manual_seed(0))
    mask_BHW, _ = discretize(map_BHW, Rule.parse("quantile:0.75"))
    assert mask_BHW.sum((1, 2)).tolist() == [500] * 8
    mask_BHW, _ = discretize(map_BHW, Rule.parse("fraction"))
    lo, hi = map_BHW.amin((1, 2), keepdim=True), map_BHW.amax((1, 2), keepdim=True)
    expected = (((map_BHW - lo) / (hi - lo)).double().mean((1, 2)) * 2000).round()
    assert (mask_BHW.sum((1, 2)) - expected).abs().max() <= 1


@pytest.mark.parametrize("rule", ["mean:1", "quantile:0.9", "otsu", "max:0.2"])
def test_scaling_and_shifting_a_map_does_not_move_its_mask(rule: str) -> None:
    map_BHW = torch.randint(0, 1000, (4, 16, 16), generator=torch.Generator().manual_seed(5)).float()
    mask_BHW, _ = discretize(map_BHW, Rule.parse(rule))
    moved_BHW, _ = discretize(map_BHW * 4 - 512, Rule.parse(rule))  # exact in float32
    assert torch.equal(mask_BHW, moved_BHW)


@pytest.mark.parametrize(
    "text", ["nosuch", "mean:x", "mean:nan", "mean:inf", "quantile:1.5", "max:-1", "otsu:3", "", ":"]
)
def test_what_is_no_rule_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--discretize") as caught:
        Rule.parse(text)
    assert "\n" not in str(caught.value)


def upsample_naive(map_hw: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    out = np.empty((height, width))
    rows, columns = map_hw.shape
    for y, x in itertools.product(range(height), range(width)):
        v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
        u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
        i, j = int(v), int(u)
        p, q = v - i, u - j
        k, m = min(i + 1, rows - 1), min(j + 1, columns - 1)
        above = (1 - q) * map_hw[i, j] + q * map_hw[i, m]
        out[y, x] = (1 - p) * above + p * ((1 - q) * map_hw[k, j] + q * map_hw[k, m])
    return out


@pytest.mark.parametrize(("grid", "size"), [((7, 7), (28, 28)), ((3, 5), (17, 23)), ((1, 1), (4, 6)), ((6, 6), (6, 6))])
def test_upsample_equals_the_naive_loop(grid: tuple[int, int], size: tuple[int, int]) -> None:
    map_Bhw = torch.randn(2, *grid, generator=torch.Generator().manual_seed(0))
    found = upsample(map_Bhw, size)
    assert found.shape == (2, *size)
    for one, map_hw in zip(found, map_Bhw, strict=True):
        assert np.allclose(one.numpy(), upsample_naive(map_hw.double().numpy(), *size), atol=1e-5)
