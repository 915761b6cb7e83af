"""Encoding and decoding equal loops over single values."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saltern.pipeline.maps.encode import CLIP_QUANTILE, dequantise, pack_mask, quantise, unpack_mask

DTYPES = ("uint8", "float16", "float32")
SIZES = [(1, 1), (1, 9), (7, 7), (8, 8), (13, 5), (31, 33)]


def heavy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return log-normal maps: a few pixels are hundreds of times the median, as in maps of squared gradients."""
    return (1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).exp()


def back(map_Bhw: Tensor, dtype: str, *, heavy_tailed: bool = False) -> np.ndarray:
    stored, lo, hi = quantise(map_Bhw, dtype, heavy_tailed=heavy_tailed)
    assert stored.shape == map_Bhw.shape
    assert str(stored.dtype) == f"torch.{dtype}"
    shape = tuple(map_Bhw.shape[1:])
    return np.stack(
        [dequantise(stored[b].numpy().tobytes(), dtype, shape, float(lo[b]), float(hi[b])) for b in range(len(map_Bhw))]
    )


def quantise_naive(values: list[float], heavy_tailed: bool) -> tuple[list[int], float, float]:
    """Quantise one map in float64."""
    ordered = sorted(values)
    lo, hi = ordered[0], ordered[-1]
    if heavy_tailed:
        clipped = ordered[-1 - round((1 - CLIP_QUANTILE) * len(ordered))]
        hi = clipped if clipped > lo else hi
    if hi == lo:
        return [0] * len(values), lo, hi
    return [math.floor(min(max((v - lo) / (hi - lo), 0), 1) * 255 + 0.5) for v in values], lo, hi


@pytest.mark.parametrize("heavy_tailed", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (40, 41), (64, 64)])
def test_uint8_equals_the_naive_loop(size: tuple[int, int], heavy_tailed: bool) -> None:
    map_Bhw = torch.cat([heavy((2, *size)), torch.randn(2, *size, generator=torch.Generator().manual_seed(3))])
    stored, lo, hi = quantise(map_Bhw, "uint8", heavy_tailed=heavy_tailed)
    for b, one in enumerate(map_Bhw):
        expected, lo_expected, hi_expected = quantise_naive(one.flatten().tolist(), heavy_tailed)
        assert (float(lo[b]), float(hi[b])) == (lo_expected, hi_expected)
        # float32 and float64 may round a half differently.
        off = np.abs(stored[b].flatten().numpy().astype(int) - expected)
        assert off.max() <= 1
        assert off.mean() < 0.01


def test_uint8_error_is_half_a_step() -> None:
    map_Bhw = torch.randn(5, 33, 17, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-6, 1e-3, 1, 1e3, 1e6]
    ).view(5, 1, 1)
    span = (map_Bhw.amax((1, 2)) - map_Bhw.amin((1, 2))).view(5, 1, 1).numpy()
    assert (np.abs(back(map_Bhw, "uint8") - map_Bhw.numpy()) <= span / 510 * 1.001).all()


def test_clipping_keeps_the_small_values_of_a_heavy_tail() -> None:
    map_Bhw = heavy((4, 100, 100))
    plain, _, _ = quantise(map_Bhw, "uint8", heavy_tailed=False)
    clipped, lo, hi = quantise(map_Bhw, "uint8", heavy_tailed=True)
    assert (plain == 0).float().mean() > 0.25
    assert (clipped == 0).float().mean() < 0.2
    found = back(map_Bhw, "uint8", heavy_tailed=True)
    inside = map_Bhw <= hi.view(4, 1, 1)
    assert inside.float().mean() == pytest.approx(CLIP_QUANTILE, abs=1e-4)
    bound = ((hi - lo).view(4, 1, 1) / 510 * 1.001).expand_as(map_Bhw)
    assert (np.abs(found - map_Bhw.numpy()) <= bound.numpy())[inside].all()
    assert (found == hi.view(4, 1, 1).numpy())[~inside].all()  # larger values are clipped to the scale's end


def test_a_clip_that_would_take_all_takes_nothing() -> None:
    map_Bhw = torch.zeros(1, 100, 100)
    map_Bhw[0, 3, 4] = 2.0
    found = back(map_Bhw, "uint8", heavy_tailed=True)
    assert found[0, 3, 4] == 2.0
    assert found.sum() == 2.0


@pytest.mark.parametrize("heavy_tailed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -3.5, 0.25])
def test_constant_maps_come_back_exactly(value: float, dtype: str, heavy_tailed: bool) -> None:
    assert (back(torch.full((2, 7, 5), value), dtype, heavy_tailed=heavy_tailed) == value).all()


@pytest.mark.parametrize("heavy_tailed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_equals_its_maps_one_by_one(dtype: str, heavy_tailed: bool) -> None:
    map_Bhw = torch.cat([heavy((3, 20, 21)), torch.zeros(1, 20, 21)])
    together = quantise(map_Bhw, dtype, heavy_tailed=heavy_tailed)
    for b in range(len(map_Bhw)):
        alone = quantise(map_Bhw[b : b + 1], dtype, heavy_tailed=heavy_tailed)
        assert all(torch.equal(many[b : b + 1], one) for many, one in zip(together, alone, strict=True))


def test_float16_and_float32_keep_what_the_dtype_can() -> None:
    map_Bhw = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(back(map_Bhw, "float32"), map_Bhw.numpy())
    found = back(map_Bhw, "float16")
    assert found.dtype == np.float32
    assert np.abs(found / map_Bhw.numpy() - 1).max() <= 2**-11


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back_is_float32_and_may_be_written_to(dtype: str) -> None:
    found = back(torch.rand(1, 3, 4), dtype)[0]
    assert found.dtype == np.float32
    raw = quantise(torch.rand(1, 3, 4), dtype, heavy_tailed=False)[0].numpy().tobytes()
    dequantise(raw, dtype, (3, 4), 0.0, 1.0)[0, 0] = 5.0


def test_uint8_without_its_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="lo and hi"):
        dequantise(bytes(4), "uint8", (2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_another_shape_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match="reshape"):
        dequantise(bytes(16), dtype, (5, 5), 0.0, 1.0)


def pack_naive(bits: list[int]) -> bytes:
    packed = bytearray(math.ceil(len(bits) / 8))
    for position, bit in enumerate(bits):
        packed[position // 8] |= bit << (7 - position % 8)
    return bytes(packed)


@pytest.mark.parametrize("size", SIZES)
def test_pack_mask_equals_numpy_and_the_naive_loop(size: tuple[int, int]) -> None:
    mask_BHW = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_mask(mask_BHW)
    assert packed.dtype == torch.uint8
    for one, raw in zip(mask_BHW, packed, strict=True):
        assert raw.numpy().tobytes() == np.packbits(one.numpy()).tobytes()
        assert raw.numpy().tobytes() == pack_naive(one.flatten().int().tolist())
        assert np.array_equal(unpack_mask(raw.numpy().tobytes(), size), one.numpy())


@pytest.mark.parametrize("filled", [False, True])
def test_full_and_empty_masks(filled: bool) -> None:
    mask_BHW = torch.full((1, 5, 5), filled)
    raw = pack_mask(mask_BHW)[0].numpy().tobytes()
    assert raw == (b"\xff\xff\xff\x80" if filled else bytes(4))  # the padding stays zero
    assert (unpack_mask(raw, (5, 5)) == filled).all()


def test_a_mask_of_another_size_is_refused() -> None:
    raw = pack_mask(torch.ones(1, 8, 8, dtype=torch.bool))[0].numpy().tobytes()
    for shape in [(8, 9), (7, 8)]:
        with pytest.raises(ValueError, match="8 bytes"):
            unpack_mask(raw, shape)
