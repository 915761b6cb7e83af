"""The Parquet schema of an evaluation: one row for each sample and subject of a run, in shard order."""

import pyarrow as pa

# Subjects: the run's own maps, and the controls that every table has.
FOUND = "found"
RANDOM, CENTRE, WHOLE = "random", "centre-box", "whole-image"
CONTROLS = (RANDOM, "centre-blob", "edges", CENTRE, WHOLE)

# Statuses of a row besides those of the run's row (schemas.saliency).
NO_BOXES = "no_boxes"  # the sample has no true boxes to judge by
BAD_BOXES = "bad_boxes"  # its annotation cannot be read
NO_MASK = "no_mask"  # the sample has no pixel mask to judge by
BAD_MASK = "bad_mask"  # its pixel mask cannot be read
MISSING, UNREADABLE = (NO_BOXES, NO_MASK), (BAD_BOXES, BAD_MASK)  # such samples are not judged

HIT_BYTES = 128  # of the column box_hits
PIXEL_BINS = 1002  # of the column pixel_counts
SANITY, ADVERSARIAL = "sanity", "adversarial"  # the families of `saltern sanity`: of an extraction, of an attack

_IDENTITY = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),  # the shard's name, as in run.json
    pa.field("index", pa.int32(), nullable=False),  # the sample's position in the shard, from 0
    pa.field("subject", pa.string(), nullable=False),  # FOUND or one of CONTROLS
    pa.field("status", pa.string(), nullable=False),  # of the run's row, or of MISSING or UNREADABLE
    pa.field("error", pa.string()),  # the reason, if status is neither ok nor zero_map
]


def _floats(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.float32()) for name in names]


# By the family of metrics, which is the name of its folder in RUN/metrics. A value is null if it could not be measured.
FIELDS: dict[str, list[pa.Field]] = {
    # le, om: 0 or 1, om null without a label; f1 in [0, 1], f1 null if the run stores no maps
    "localization": [
        *_floats("le", "om", "f1", "f1_mask"),
        # 0 or 1, 0 or 1, [0, 1]; null if the run stores no maps, pointing_difficult also outside of the subset
        *_floats("pointing", "pointing_difficult", "energy"),
        *_floats("box_iou"),  # in [0, 1]
        pa.field("other_size", pa.bool_()),
    ],
    "max-box": [
        # 4 x 256 packed bits, the first one highest: at which levels of the 8-bit map a box hits a true one, by an IoU
        # of at least 0.5 (largest contour), 0.3, 0.5 and 0.7 (all contours); null if the run stores no maps
        pa.field("box_hits", pa.binary(HIT_BYTES)),
    ],
    "pixels": [
        *_floats("segmentation_iou"),  # in [0, 1]; null if neither mask has a pixel
        # 2 x PIXEL_BINS uint32, little-endian: how many pixels of the foreground, then of the background, have a value
        # in each bin (pipeline/metrics/localization/pixels.py); null if the image could not be read or the run stores
        # no maps
        pa.field("pixel_counts", pa.binary(2 * PIXEL_BINS * 4)),
    ],
    "statistics": _floats("total_variation", "entropy", "map_mean", "map_std", "mask_area"),
    "perturbation": _floats("insertion", "deletion"),  # in [0, 1]
    # average_drop in [0, 1]; increase 0 or 1; rho_plus null for a map of zeros, rho_minus for a map of ones
    "road": _floats("road"),  # in [-0.5, 0.5]
    "composite": _floats("coherency", "adcc", "arcc"),  # in [0, 1]; null for controls
    # A value for each classifier: the run's own, then the further ones in the order of the evaluation's config. Whether
    # its top-1 is the label; null without a label or a mask
    "masked": [pa.field(name, pa.list_(pa.bool_())) for name in ("whole", "masked_in", "masked_out", "inpainted")],
    "confidence": _floats("average_drop", "increase", "rho_plus", "rho_minus"),
    # Of `saltern sanity` (pipeline/metrics/sanity/cascade.py); null if the row has no map. A value for each stage: the
    # last layer that is random, similarities to the map of the trained model, bits, whether the map is constant
    SANITY: [
        *_floats("entropy_before"),  # bits, of the map of the trained model
        pa.field("layers", pa.list_(pa.string())),
        *[pa.field(name, pa.list_(pa.float32())) for name in ("spearman", "absolute", "ssim", "entropy")],
        pa.field("constant", pa.list_(pa.bool_())),
    ],
    # Of `saltern sanity` for an attack (pipeline/metrics/sanity/adversarial.py): in [0, 1]; in [-1, 1]; null if the row
    # is not ok
    ADVERSARIAL: [pa.field(name, pa.float64()) for name in ("overlap", "spearman")],
}


def evaluation_schema(family: str) -> pa.Schema:
    """Return the columns of a family's data files, in order."""
    return pa.schema([*_IDENTITY, *FIELDS[family]])
