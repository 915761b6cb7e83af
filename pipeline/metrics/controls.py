"""Make control maps: subjects that know nothing of the network, for the rows that a method has to beat.

Shape suffixes: B batch, H W the network's input, C colours.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.methods.gradients.noise import uniform
from saltern.pipeline.metrics.localization.boxes import centre_box

SIGMA = 0.25  # of the blob, in sides of the image
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's and OpenCV's grey


def control(name: str, pixels_BHWC: Tensor, seed_B: Tensor) -> Tensor:
    """Return map_BHW, float32, on the pixels' device.

    - random: every pixel is a uniform draw in [0, 1) from its sample's seed. It is not smoothed: a smooth map has other
      scores in most metrics (blur raises ROAD), and the blob is the smooth control.
    - centre-blob: a Gaussian at the centre, in (0, 1]; sigma is a quarter of the height and of the width.
    - edges: magnitude of the Sobel gradient of the grey image (BT.601, in [0, 1]); edge pixels are repeated outwards.
    - centre-box: 1 in the centred box of half the area (`localization.boxes.centre_box`), 0 outside of it.
    - whole-image: ones.

    Args:
        name: one of CONTROLS.
        pixels_BHWC: uint8.
        seed_B: int64, of `sample_seeds`, on the pixels' device; only `random` reads it.
    """
    if name not in CONTROLS:
        raise ValueError(f"the control is {name!r}, not one of {', '.join(CONTROLS)}")
    return CONTROLS[name](pixels_BHWC, seed_B)


def sample_seeds(seed: int, keys: Sequence[str]) -> Tensor:
    """Return seed_B, int64, on the host: a function of each sample's key and the run's seed, as in extract."""
    return torch.tensor([zlib.crc32(f"{seed}/{key}".encode()) for key in keys])


def _random(pixels_BHWC: Tensor, seed_B: Tensor) -> Tensor:
    size = pixels_BHWC.shape[1:3]
    return uniform(seed_B, size[0] * size[1]).view(-1, *size)


def _centre_blob(pixels_BHWC: Tensor, _: Tensor) -> Tensor:
    samples, *size = pixels_BHWC.shape[:3]
    height, width = (_bell(side, pixels_BHWC.device) for side in size)
    return (height[:, None] * width).expand(samples, -1, -1).contiguous()


def _bell(side: int, device: torch.device) -> Tensor:
    offset = torch.arange(side, device=device) - (side - 1) / 2  # from the centre to the centres of the pixels
    return torch.exp(-((offset / (SIGMA * side)) ** 2) / 2)


def _edges(pixels_BHWC: Tensor, _: Tensor) -> Tensor:
    red, green, blue = (weight * pixels_BHWC[..., colour].float() for colour, weight in enumerate(_GREY))
    padded_BHW = F.pad((red + green + blue) / 255, (1, 1, 1, 1), mode="replicate")
    across_BHW = _smoothed(padded_BHW[:, :, 2:] - padded_BHW[:, :, :-2], dim=1)
    down_BHW = _smoothed(padded_BHW[:, 2:] - padded_BHW[:, :-2], dim=2)
    return torch.hypot(across_BHW, down_BHW)


def _smoothed(slope_BHW: Tensor, dim: int) -> Tensor:
    """Return sums of three neighbours, weighed 1, 2, 1: shorter by two."""
    length = slope_BHW.shape[dim] - 2
    return sum(slope_BHW.narrow(dim, at, length) * weight for at, weight in enumerate((1, 2, 1)))  # type: ignore[return-value]


def _centre_box(pixels_BHWC: Tensor, _: Tensor) -> Tensor:
    map_BHW = torch.zeros(pixels_BHWC.shape[:3], device=pixels_BHWC.device)
    x0, y0, x1, y1 = centre_box(*pixels_BHWC.shape[1:3])
    map_BHW[:, y0:y1, x0:x1] = 1
    return map_BHW


def _whole_image(pixels_BHWC: Tensor, _: Tensor) -> Tensor:
    return torch.ones(pixels_BHWC.shape[:3], device=pixels_BHWC.device)


CONTROLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "random": _random,
    "centre-blob": _centre_blob,
    "edges": _edges,
    "centre-box": _centre_box,
    "whole-image": _whole_image,
}
