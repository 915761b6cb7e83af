"""What the metrics of this room share: scaled maps, masked images, probabilities in passes of a bounded size.

Shape suffixes: B batch, C H W the network's input, K classes, R images of one pass.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # normalised x_BCHW -> logits_BK, of a network in eval mode
BATCH = 64  # images of a pass, unless the caller says otherwise
PIXELS, NORMALISED = MULTIPLY = ("pixels", "normalised")  # what a map multiplies: the pixels, or the normalised tensor


def probability(logits_BK: Tensor, target_B: Tensor) -> Tensor:
    """Return the softmax probability of each sample's target, float32, whatever the precision of the logits."""
    return logits_BK.float().softmax(1).gather(1, target_B[:, None])[:, 0]


@torch.no_grad()
def target_probability(logits: Logits, x_BCHW: Tensor, target_B: Tensor, *, batch: int = BATCH) -> Tensor:
    """Return probability_B of the targets, float32, by passes of at most `batch` images."""
    starts = range(0, len(target_B), batch)
    return torch.cat([probability(logits(x_BCHW[at : at + batch]), target_B[at : at + batch]) for at in starts])


def shared_passes(versions: int, samples: int, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (version_R, sample_R), int64: the images of each pass, at most `batch`, over all versions of all samples.

    The order is version by version, so that the results of all passes, joined, have the shape (versions, samples).
    """
    total = versions * samples
    for start in range(0, total, batch):
        image_R = torch.arange(start, min(start + batch, total), device=device)
        yield image_R // samples, image_R % samples


def unit_maps(map_BHW: Tensor) -> Tensor:
    """Scale each map to [0, 1], float32, from its smallest to its largest value.

    A constant map has no scale: it becomes ones if its value is positive (the whole image), else zeros (no map).
    """
    map_BHW = map_BHW.float()
    lo_B11, hi_B11 = map_BHW.amin((1, 2), keepdim=True), map_BHW.amax((1, 2), keepdim=True)
    span_B11 = hi_B11 - lo_B11
    scaled_BHW = (map_BHW - lo_B11) / span_B11.where(span_B11 > 0, torch.ones_like(span_B11))
    return torch.where(span_B11 > 0, scaled_BHW, (hi_B11 > 0).float())


def black_level(mean: Sequence[float], std: Sequence[float], multiply: str, device: torch.device) -> Tensor:
    """Return black_C11, what a weight of 0 turns a pixel into. Make it once: the copy to a GPU waits.

    Args:
        mean, std: of the normalisation, for pixels in [0, 1].
        multiply: `pixels`: the map multiplies pixels in [0, 1], so that 0 is black; `normalised`: it multiplies the
            network's input, so that 0 is the mean colour.
    """
    if multiply not in MULTIPLY:
        raise ValueError(f"multiply is {multiply!r}, not one of {', '.join(MULTIPLY)}")
    black = [-m / s if multiply == PIXELS else 0.0 for m, s in zip(mean, std, strict=True)]
    return torch.tensor(black, device=device)[:, None, None]


def masked(x_BCHW: Tensor, weight_BHW: Tensor, black_C11: Tensor) -> Tensor:
    """Return images whose pixels are dimmed by weights in [0, 1]: 1 keeps a pixel to the bit, 0 gives black_C11."""
    weight_B1HW = weight_BHW[:, None]
    return x_BCHW * weight_B1HW + black_C11 * (1 - weight_B1HW)
