"""Encode maps and masks as bytes, and decode them.

Packing and quantising run on the device, so that only the stored bytes are copied to the host.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CLIP_QUANTILE = 0.999  # of heavy-tailed maps, as scaling by their maximum would round 11-40 % of the pixels to zero
_GATHER = 0x8040201008040201 - 2**64  # bits 63, 54, ..., 9, 0, as a signed integer
_TORCH = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


def quantise(map_Bhw: Tensor, dtype: str, *, heavy_tailed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Convert float maps to the stored type.

    Args:
        map_Bhw: float32, finite.
        dtype: uint8 | float16 | float32.
        heavy_tailed: for uint8, end the scale at each map's CLIP_QUANTILE instead of its maximum.

    Returns:
        stored_Bhw of that dtype; lo_B, hi_B float32 with value = lo + u8 / 255 * (hi - lo) for uint8.
    """
    flat_BN = map_Bhw.flatten(1)
    lo_B = flat_BN.amin(1)
    if dtype != "uint8":
        return map_Bhw.to(_TORCH[dtype]), lo_B, flat_BN.amax(1)
    above = round((1 - CLIP_QUANTILE) * flat_BN.shape[1]) if heavy_tailed else 0
    hi_B = flat_BN.topk(above + 1, 1).values[:, -1]
    # A map with fewer non-zero pixels than the quantile clips keeps its full range.
    hi_B = hi_B.where(hi_B > lo_B, flat_BN.amax(1))
    span_B = (hi_B - lo_B).where(hi_B > lo_B, torch.ones_like(hi_B))
    unit_Bhw = (map_Bhw - lo_B[:, None, None]) / span_B[:, None, None]
    return (unit_Bhw.clamp(0, 1) * 255).round().to(torch.uint8), lo_B, hi_B


def dequantise(
    raw: bytes, dtype: str, shape: tuple[int, int], lo: float | None = None, hi: float | None = None
) -> NDArray[np.float32]:
    """Return a stored map as a float32 (height, width) array: the inverse of `quantise`, except for rounding."""
    stored = np.frombuffer(raw, dtype).reshape(shape)
    if dtype != "uint8":
        return stored.astype(np.float32)
    if lo is None or hi is None:
        raise ValueError("a uint8 map needs its lo and hi")
    return (np.float32(lo) + stored / np.float32(255) * np.float32(hi - lo)).astype(np.float32)


def pack_mask(mask_BHW: Tensor) -> Tensor:
    """Pack bool masks into bits, uint8 (B, ceil(H * W / 8)): row-major, first pixel = highest bit, zero padding."""
    bits_BN = F.pad(mask_BHW.flatten(1), (0, -mask_BHW[0].numel() % 8))
    # Eight bool bytes form one little-endian integer. The product's highest byte holds their bits, the first on top.
    return ((bits_BN.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack_masks(packed_BN: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return packed bits as bool (B, height, width): the inverse of `pack_mask`."""
    bits_BN = np.unpackbits(packed_BN, axis=1, count=shape[0] * shape[1])
    mask_BHW: NDArray[np.bool_] = bits_BN.reshape(-1, *shape).view(np.bool_)
    return mask_BHW


def packed_rows(packed_BN: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return packed masks with each row packed, and filled up, by itself: (B, height, bytes of a row)."""
    if shape[1] % 8 == 0:
        return packed_BN.reshape(len(packed_BN), shape[0], -1)
    return np.packbits(unpack_masks(packed_BN, shape), axis=2)


def unpack_mask(raw: bytes, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the packed bits of one mask as a bool (height, width) array.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    count = shape[0] * shape[1]
    if len(raw) != -(-count // 8):  # numpy would cut or fill it without an error
        raise ValueError(f"{len(raw)} bytes are not a packed mask of {shape[0]} x {shape[1]} pixels")
    mask_HW: NDArray[np.bool_] = unpack_masks(np.frombuffer(raw, np.uint8)[None], shape)[0]
    return mask_HW
