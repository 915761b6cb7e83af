"""The metrics of each family: their titles in tables and pages, and which of their values are better."""

from dataclasses import dataclass
from enum import Enum


class Better(Enum):
    """Which values of a metric are better."""

    LESS, MORE, NEITHER = "↓", "↑", ""


@dataclass(frozen=True)
class Metric:
    """A column of the tables."""

    title: str
    better: Better
    help: str  # one line
    percent: bool = True  # shown as 100 times the value


# By family, which is the name of its folder in RUN/metrics, and by the column that is averaged.
METRICS: dict[str, dict[str, Metric]] = {
    "localization": {
        "le": Metric("LE %", Better.LESS, "localization error: no box has an IoU of more than 0.5 with a true one"),
        "om": Metric("OM %", Better.LESS, "no such box, or the top-1 is wrong"),
        "f1": Metric("F1 %", Better.MORE, "continuous F1 of the map"),
        "f1_mask": Metric("F1 % of the mask", Better.MORE, "continuous F1 of the mask"),
        "pointing": Metric("pointing %", Better.MORE, "the maximum lies within 15 pixels of a true box"),
        "pointing_difficult": Metric(
            "difficult %", Better.MORE, "pointing, where the boxes cover under a quarter and distractors are known"
        ),
        "energy": Metric("energy %", Better.MORE, "share of the scaled map's sum in the true boxes"),
        "box_iou": Metric("box IoU %", Better.MORE, "IoU of the mask and the true boxes, filled"),
    },
    "max-box": {
        "max_box_acc": Metric("MaxBoxAcc %", Better.MORE, "largest contour, IoU >= 0.5, at the best threshold"),
        "max_box_acc_v2": Metric("MaxBoxAccV2 %", Better.MORE, "all contours, mean over IoU >= 0.3, 0.5, 0.7"),
    },
    "pixels": {
        "pxap": Metric("PxAP %", Better.MORE, "area below the precision-recall curve of the pixels of all samples"),
        "segmentation_iou": Metric("mask IoU %", Better.MORE, "IoU of the mask and the true pixel mask"),
    },
    "statistics": {
        "total_variation": Metric("TV", Better.NEITHER, "total variation of the scaled map, over its pixels", False),
        "entropy": Metric("entropy, bits", Better.NEITHER, "of the map's values in 256 bins", False),
        "map_mean": Metric("mean", Better.NEITHER, "of the map, scaled to [0, 1]", False),
        "map_std": Metric("std", Better.NEITHER, "of the scaled map, over its pixels", False),
        "mask_area": Metric("mask %", Better.NEITHER, "share of the image in the mask"),
    },
    "perturbation": {
        "insertion": Metric("insertion", Better.MORE, "area while pixels replace a blurred image, 50 steps", False),
        "deletion": Metric("deletion", Better.LESS, "area while the mean colour replaces pixels, 50 steps", False),
    },
    "confidence": {
        "average_drop": Metric("average drop %", Better.LESS, "max(0, p(x) - p(m x)) / p(x)"),
        "increase": Metric("increase %", Better.MORE, "share of images with p(m x) > p(x)"),
        "rho_plus": Metric("ρ+", Better.MORE, "positive map density: p(m x) / mean(m)", False),
        "rho_minus": Metric("ρ-", Better.LESS, "negative map density: p((1 - m) x) / mean(1 - m)", False),
    },
    "road": {
        "road": Metric(
            "ROAD", Better.MORE, "(LeRF - MoRF) / 2 at 20, 40, 60 and 80 %; blurring a map raises it", False
        ),
    },
    "composite": {
        "coherency": Metric("coherency", Better.MORE, "correlation of the map and that of the masked image", False),
        "adcc": Metric("ADCC", Better.MORE, "of coherency, 1 - mean of the map, 1 - average drop", False),
        "arcc": Metric("ARCC", Better.MORE, "of coherency, 1 - mean of the map, ROAD", False),
    },
    "masked": {
        "masked_in": Metric("top-1 in %", Better.MORE, "top-1 on the image times its mask, mean over the classifiers"),
        "masked_out": Metric("top-1 out %", Better.LESS, "top-1 on the image times 1 - mask"),
        "inpainted": Metric("inpainted %", Better.LESS, "top-1 on the image whose mask is inpainted"),
    },
}
