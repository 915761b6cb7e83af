"""Fill the masked part of an image from its surroundings.

Shape suffixes: H W an image, C its colours.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

RADIUS = 3  # pixels of the neighbourhood that a pixel is inpainted from


def inpaint(pixels_HWC: NDArray[np.uint8], mask_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Fill the masked pixels of an image by fast marching (Telea 2004), radius 3."""
    if mask_HW.all():
        return np.zeros_like(pixels_HWC)  # nothing to start from: OpenCV would return the image
    return np.asarray(cv2.inpaint(pixels_HWC, mask_HW.astype(np.uint8), RADIUS, cv2.INPAINT_TELEA), np.uint8)
