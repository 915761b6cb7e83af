"""Give the controls of a batch as rows, as if a method had made them.

Shape suffixes: N samples, M those whose image was read, H W the network's input.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from saltern.pipeline.maps.boxes import largest_boxes
from saltern.pipeline.maps.discretize import discretize
from saltern.pipeline.maps.encode import pack_mask, packed_rows
from saltern.pipeline.maps.frame import to_original, whole_image
from saltern.pipeline.metrics.controls import control, sample_seeds
from saltern.pipeline.metrics.localization.boxes import centre_box
from saltern.pipeline.runs.reader import Layout, Row
from saltern.schemas.config import ExtractConfig
from saltern.schemas.evaluation import CENTRE, WHOLE
from saltern.schemas.saliency import OK, Box

# In the frame of the original, as no method's crop should limit them.
BOXES = {CENTRE: centre_box, WHOLE: whole_image}


def control_rows(subject: str, rows: Sequence[Row], pixels_MHWC: Tensor | None, config: ExtractConfig) -> list[Row]:
    """Return the rows with the control's maps, and the masks and boxes that the run's rule makes of them.

    Rows whose image the run could not read are returned as they are. The boxes of centre box and whole image are those
    of the original image, also where the network sees a crop of it.
    """
    shown = list(rows)
    if pixels_MHWC is None:
        return shown
    at_M = [at for at, row in enumerate(rows) if row.geometry is not None]
    map_MHW = control(subject, pixels_MHWC, sample_seeds(config.seed, [rows[at].key for at in at_M]))
    mask_MHW, threshold_M = discretize(map_MHW, config.discretize)
    packed_MN, (height, width) = pack_mask(mask_MHW).numpy(), map_MHW.shape[1:]
    box_M4 = largest_boxes(packed_rows(packed_MN, (height, width)))
    geometry_M4 = np.array([rows[at].geometry for at in at_M], np.float64)
    size_M2 = np.array([[rows[at].image_height, rows[at].image_width] for at in at_M], np.int32)
    original_M4 = to_original(box_M4, geometry_M4, size_M2)
    for slot, at in enumerate(at_M):
        found: list[Box] = [tuple(original_M4[slot].tolist())] if box_M4[slot, 2] else []
        if subject in BOXES:
            found = [BOXES[subject](*size_M2[slot].tolist())]
        shown[at] = replace(
            rows[at],
            layout=Layout("float32", (height, width)),
            map_bytes=map_MHW[slot].numpy().tobytes(),
            map_height=height,
            map_width=width,
            map_lo=None,
            map_hi=None,
            mask_bytes=packed_MN[slot].tobytes(),
            mask_threshold=float(threshold_M[slot]),
            mask_area=float(mask_MHW[slot].float().mean()),
            boxes=[list(box) for box in found],
            status=OK,
            error=None,
        )
    return shown
