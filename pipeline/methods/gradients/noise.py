"""Noise that depends only on a sample's seed, not on its batch or on earlier draws.

Shape suffixes: B batch, S draws, N elements of an image.
"""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed integers: products and sums wrap around
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_LOW = 2**32 - 1


def gaussian(seed_B: Tensor, draws: range, elements: int) -> Tensor:
    """Return standard normal noise_SBN, float32, on the seeds' device.

    A value is a function of its seed, draw and element: SplitMix64 (Steele 2014) as a counter, then Box-Muller. It is
    the same on every device up to float rounding.

    Args:
        seed_B: int64, one a sample.
        draws: numbers of the draws.
        elements: values in a draw.
    """
    device, half = seed_B.device, (elements + 1) // 2
    draw_S1 = torch.arange(draws.start, draws.stop, device=device)[:, None]
    stream_SB1 = mixed(mixed(seed_B * _GOLDEN)[None] + draw_S1 * _GOLDEN)[..., None]
    bits_SBN = mixed(stream_SB1 + torch.arange(1, half + 1, device=device) * _GOLDEN)
    angle_SBN = (bits_SBN & _LOW).float().mul_(2 * math.pi / 2**32)
    # Half a step above zero, because the logarithm of zero is infinite.
    radius_SBN = ((bits_SBN >> 32) & _LOW).float().add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    del bits_SBN  # eight bytes each
    noise_SBN = radius_SBN.new_empty(*radius_SBN.shape[:2], elements)
    torch.mul(radius_SBN, angle_SBN.cos(), out=noise_SBN[..., :half])
    rest = elements - half
    torch.mul(radius_SBN[..., :rest], angle_SBN[..., :rest].sin(), out=noise_SBN[..., half:])
    return noise_SBN


def uniform(seed_B: Tensor, elements: int, first: int = 0) -> Tensor:
    """Return uniform noise_BN in [0, 1), float32, on the seeds' device: multiples of 2^-24, the same on every device.

    Args:
        seed_B: int64, one a sample.
        elements: values of a sample.
        first: the number of the first of them.
    """
    counter_N = torch.arange(first + 1, first + elements + 1, device=seed_B.device) * _GOLDEN
    bits_BN = mixed(mixed(seed_B * _GOLDEN)[:, None] + counter_N)
    return _shifted(bits_BN, 40).float().mul_(2**-24)


def mixed(bits: Tensor) -> Tensor:
    """Return int64 values after SplitMix64's finaliser."""
    bits = (bits ^ _shifted(bits, 30)).mul_(_FIRST)
    bits = bits.bitwise_xor_(_shifted(bits, 27)).mul_(_SECOND)
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: Tensor, by: int) -> Tensor:
    # Clear the copies of the sign that a shift of signed integers inserts.
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)
