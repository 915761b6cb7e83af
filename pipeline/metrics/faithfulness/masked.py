"""Classify images of which the mask shows one part, and images whose masked part is inpainted.

Zolna 2018 (CASM, 1805.08249), figure 3 and its published evaluation: if a mask holds all that classifiers use, they
recognise the masked-in images and fail on the others, and inpainting does not bring the class back.

Shape suffixes: B batch, H W the network's input, C colours.
"""

# ruff: noqa: N815  (fields carry a shape suffix)

from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.maps.inpaint import inpaint
from saltern.pipeline.metrics.faithfulness.passes import BATCH, Logits, masked


class Correct(NamedTuple):
    """Whether the classifier's top-1 is the label. All bool."""

    whole_B: Tensor  # of the image
    masked_in_B: Tensor  # of the image times its mask; more is better
    masked_out_B: Tensor  # of the image times 1 - mask; less is better
    inpainted_B: Tensor  # of the masked-out image with the gap inpainted; less is better


def masked_classification(
    logits: Logits,
    x_BCHW: Tensor,
    inpainted_BCHW: Tensor,
    mask_BHW: Tensor,
    label_B: Tensor,
    black_C11: Tensor,
    *,
    batch: int = BATCH,
) -> Correct:
    """Classify each image whole, masked in, masked out and inpainted: four passes of the batch's size.

    Args:
        logits: of one of the classifiers, normalised images to logits_BK.
        x_BCHW: images, normalised for this classifier.
        inpainted_BCHW: what `start_inpainting` made of the same images, normalised in the same way.
        mask_BHW: bool, at the images' resolution.
        label_B: int64, the true classes.
        black_C11: of `passes.black_level`; the published evaluation multiplies `pixels`.
        batch: images of a pass at most.
    """
    inside_BHW = mask_BHW.float()
    images = (x_BCHW, masked(x_BCHW, inside_BHW, black_C11), masked(x_BCHW, 1 - inside_BHW, black_C11), inpainted_BCHW)
    return Correct(*(_is_top1(logits, image_BCHW, label_B, batch) for image_BCHW in images))


@torch.no_grad()
def _is_top1(logits: Logits, x_BCHW: Tensor, label_B: Tensor, batch: int) -> Tensor:
    starts = range(0, len(label_B), batch)
    return torch.cat([logits(x_BCHW[at : at + batch]).argmax(1) for at in starts]) == label_B


def start_inpainting(
    pool: Executor, pixels_BHWC: NDArray[np.uint8], mask_BHW: NDArray[np.bool_]
) -> list[Future[NDArray[np.uint8]]]:
    """Inpaint the masked pixels of each image in a pool, while the device classifies other images.

    Use threads: OpenCV releases the GIL, and processes would copy every image twice. A core makes about 23 images a
    second of 224 x 224 pixels, half of them masked; the time grows with the masked area.

    Args:
        pool: threads, as many as there are cores for them.
        pixels_BHWC: the images; their masked pixels have no influence.
        mask_BHW: what to fill. An image that is masked everywhere becomes black.

    Returns:
        A future for each image, of pixels_HWC. `numpy.stack([future.result() for future in futures])` waits for all.
    """
    return [pool.submit(inpaint, *pair) for pair in zip(pixels_BHWC, mask_BHW, strict=True)]
