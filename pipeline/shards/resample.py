"""Resample decoded images on their device, in batches, as Pillow does: antialiased, to the crop, rounded to uint8.

An image is multiplied by one matrix of filter weights for each axis. Products are of float16 with sums in float32, as
tensor cores compute them. Levels are exact in float16; the weights' rounding moves some values by one level.

Shape suffixes: B batch, P a part of it, C channels, h w the crop, S side of a part's largest region (height or width).
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from saltern.pipeline.shards.decode import Geometry, Region, window
from saltern.schemas.config import Preprocess

_MOST = 2**26  # pixels of the regions that are resampled at once
_A = -0.5  # the constant of Pillow's bicubic filter


def resample(images_CHW: Sequence[Tensor], geometries: Sequence[Geometry], preprocess: Preprocess) -> Tensor:
    """Return the input of each image, uint8, (B, height, width, 3). All work is on the images' device, without a wait.

    Args:
        images_CHW: uint8, RGB, whole and upright, all on one device.
        geometries: of the images, as `geometry_of` gives them.
        preprocess: its crop and interpolation are used.
    """
    regions = [
        window(image.shape[2], image.shape[1], geometry, preprocess.shape)
        for image, geometry in zip(images_CHW, geometries, strict=True)
    ]
    return resample_regions(images_CHW, regions, preprocess)


def resample_regions(images_CHW: Sequence[Tensor], regions: Sequence[Region], preprocess: Preprocess) -> Tensor:
    """Return the input of each image as `resample` does, from any region of it; a box can mirror its image."""
    device = images_CHW[0].device
    groups = _groups(regions)
    order = [position for positions, _, _ in groups for position in positions]
    spans_B23 = send(torch.tensor([_spans(*regions[position]) for position in order]), device)
    back_B = send(torch.tensor(order).argsort(), device)
    parts = []
    first = 0
    for positions, height, width in groups:
        spans_P23 = spans_B23[first : first + len(positions)]
        first += len(positions)
        levels_PCSS = torch.empty((len(positions), 3, height, width), dtype=torch.uint8, device=device)
        for slot_CSS, position in zip(levels_PCSS, positions, strict=True):
            left, top, right, bottom = regions[position][0]
            slot_CSS[:, : bottom - top, : right - left] = images_CHW[position][:, top:bottom, left:right]
        columns, rows = preprocess.shape[::-1]
        weights = [
            _weights(spans_P23[:, 0], width, columns, preprocess.interpolation),
            _weights(spans_P23[:, 1], height, rows, preprocess.interpolation),
        ]
        parts.append(_multiply(levels_PCSS, *weights))
    return torch.cat(parts)[back_B]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, without a wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _spans(bounds: tuple[int, int, int, int], box: tuple[float, float, float, float]) -> list[list[float]]:
    """Return for x and y where the crop begins and ends in the region, and the region's length."""
    return [[box[axis], box[axis + 2], float(bounds[axis + 2] - bounds[axis])] for axis in (0, 1)]


def _groups(regions: Sequence[Region]) -> list[tuple[list[int], int, int]]:
    """Return the positions of regions of similar size, with the height and width that hold them."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, ((left, top, right, bottom), _) in enumerate(regions):
        alike[_round_up(bottom - top), _round_up(right - left)].append(position)
    groups = []
    for (height, width), positions in alike.items():
        most = max(1, _MOST // (height * width))
        groups += [(positions[first : first + most], height, width) for first in range(0, len(positions), most)]
    return groups


def _round_up(side: int) -> int:
    """Return the next side of the form 2^k or 3 * 2^(k-1), at least 64."""
    power = max(64, 1 << (side - 1).bit_length())
    return power * 3 // 4 if side <= power * 3 // 4 and power > 64 else power


def _weights(spans_B3: Tensor, size: int, crop: int, interpolation: str) -> Tensor:
    """Return the filter's weights of each pixel of a region (columns) for each pixel of the crop (rows), along an axis.

    Args:
        spans_B3: as `_spans` gives them for the axis.
        size: columns; those beyond the region are zero.
        crop: rows, pixels of the crop.
    """
    start_B, end_B, length_B = spans_B3.view(-1, 3, 1, 1).unbind(1)
    scale_B = (end_B - start_B) / crop  # below zero for a mirrored image
    output = torch.arange(crop, device=spans_B3.device).view(1, -1, 1)
    pixel_S = torch.arange(size, device=spans_B3.device)
    distance_BoS = (pixel_S + 0.5 - (start_B + scale_B * (output + 0.5))).abs_().div_(scale_B.abs().clamp(min=1))
    weight_BoS = _bicubic(distance_BoS) if interpolation == "bicubic" else (1 - distance_BoS).clamp_(min=0)
    weight_BoS *= pixel_S < length_B
    return (weight_BoS / weight_BoS.sum(2, keepdim=True)).half()


def _bicubic(x: Tensor) -> Tensor:
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _multiply(levels_BCSS: Tensor, weight_BwS: Tensor, weight_BhS: Tensor) -> Tensor:
    """Return the regions after both passes, x first, each rounded to levels: uint8, (B, h, w, C)."""
    batch, channels, height, _ = levels_BCSS.shape
    rows_BTw = _levels(_product(levels_BCSS.half().flatten(1, 2), weight_BwS.transpose(1, 2)))
    rows_BSx = rows_BTw.half().view(batch, channels, height, -1).transpose(1, 2).flatten(2)
    pixels_Bhx = _levels(_product(weight_BhS, rows_BSx))
    return pixels_Bhx.view(batch, -1, channels, weight_BwS.shape[1]).transpose(2, 3)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of float16 matrices, summed in float32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def _levels(value: Tensor) -> Tensor:
    return value.add_(0.5).clamp_(0, 255).to(torch.uint8)
