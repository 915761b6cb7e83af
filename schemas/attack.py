"""The Parquet schema of an attack run: one row for each sample, in shard order; images as PNG files of 8 bits.

The file's metadata holds its provenance under the `saltern` key, as those of a saliency dataset do. Norms are of the
perturbation p in the unit of pixels in [0, 1], over all pixels and channels; `outside` weighs p by 1 - map first.
"""

import pyarrow as pa

# One set of these columns for each side: `plain_score`, `guided_score`, ...
_EACH = (
    ("score", pa.float32()),  # softmax probability of `target` on the perturbed image
    ("predicted", pa.int32()),  # top-1 of the perturbed image
    ("fooled", pa.bool_()),  # whether that is `target`
    ("norm", pa.float32()),  # ||p||_2
    ("outside", pa.float32()),  # ||p * (1 - map)||_2
    ("image", pa.binary()),  # PNG of the perturbed image; null if images are not stored
)
SIDES = ("plain", "guided")


def attack_schema() -> pa.Schema:
    """Return the columns, in order."""
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),  # the sample's own key
            pa.field("shard", pa.string(), nullable=False),  # the shard's name, as in run.json
            pa.field("index", pa.int32(), nullable=False),  # the sample's position in the shard, from 0
            pa.field("label", pa.int32()),  # the given class (`cls`)
            pa.field("predicted", pa.int32()),  # top-1 of the clean image: the class that the map explains
            pa.field("score", pa.float32()),  # its softmax probability
            pa.field("target", pa.int32()),  # the class to be seen: the least likely one of the clean image
            *[pa.field(f"{side}_{name}", kind) for side in SIDES for name, kind in _EACH],
            pa.field("norm_reduction", pa.float32()),  # 1 - guided_norm / plain_norm
            pa.field("image", pa.binary()),  # PNG of the clean image, as the network sees it; null as above
            pa.field("map", pa.binary()),  # PNG, grey: the map of the clean image, 255 = 1; null as above
            pa.field("image_height", pa.int32()),  # pixels of the upright original
            pa.field("image_width", pa.int32()),
            pa.field("geometry", pa.list_(pa.float32(), 4)),  # as in saltern.schemas.saliency
            pa.field("status", pa.string(), nullable=False),  # one of saltern.schemas.saliency.STATUSES
            pa.field("error", pa.string()),  # the reason, if status is not ok
        ]
    )
