"""The Parquet schema of a saliency dataset: one row for each (sample, target), in shard order.

Each input shard has one file. The file's metadata holds, as JSON under the `saltern` key, the properties that all its
rows share: dtype and shape of the maps, bit order of the masks, provenance.
"""

import json
from typing import Any

import pyarrow as pa

from saltern.schemas.config import SCHEMA_VERSION

METADATA_KEY = b"saltern"

# Statuses of a row. Only `ok` rows are complete.
OK = "ok"
DECODE_FAILED = "decode_failed"  # the bytes are not an image, or the image is damaged
TOO_LARGE = "too_large"  # the image has more pixels than can be decoded safely
MISSING_IMAGE = "missing_image"  # the sample has no image member
MISSING_LABEL = "missing_label"  # the target is the label, and `cls` is absent, not a number or out of range
DUPLICATE_KEY = "duplicate_key"  # an earlier sample of the shard has this key, which must name one sample
NONFINITE = "nonfinite"  # the method gave NaN or infinity, or the map does not fit its stored dtype
ZERO_MAP = "zero_map"  # the method gave zeros everywhere: a true result, with an empty mask
OUT_OF_MEMORY = "out_of_memory"  # the image does not fit in the memory of the machine or the device, even alone
STATUSES = (
    *(OK, DECODE_FAILED, TOO_LARGE, MISSING_IMAGE, MISSING_LABEL, DUPLICATE_KEY, NONFINITE, ZERO_MAP),
    OUT_OF_MEMORY,
)


def table_schema(map_bytes: int | None) -> pa.Schema:
    """Return the columns, in order.

    Args:
        map_bytes: bytes of one stored map (height * width * itemsize); None if maps are not stored, which makes
            the column null in every row.
    """
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),  # the sample's own key
            pa.field("shard", pa.string(), nullable=False),  # the shard's name, as in run.json
            pa.field("index", pa.int32(), nullable=False),  # the sample's position in the shard, from 0
            pa.field("label", pa.int32()),  # the given class (`cls`)
            pa.field("predicted", pa.int32()),  # the class with the largest logit
            pa.field("target", pa.int32()),  # the class explained; null for a class-agnostic method
            pa.field("score", pa.float32()),  # softmax probability of target, in [0, 1]
            pa.field("map", pa.binary(-1 if map_bytes is None else map_bytes)),  # row-major; dtype in the metadata
            pa.field("map_height", pa.int16()),  # cells
            pa.field("map_width", pa.int16()),  # cells
            pa.field("map_lo", pa.float32()),  # uint8 maps: value = lo + u8 / 255 * (hi - lo)
            pa.field("map_hi", pa.float32()),
            pa.field("mask", pa.binary()),  # packed bits, row-major at input resolution, first pixel = highest bit
            pa.field("mask_threshold", pa.float32()),  # mask = upsampled map >= threshold, in the map's own unit
            pa.field("mask_area", pa.float32()),  # share of the input's pixels that are 1, in [0, 1]
            pa.field("boxes", pa.list_(pa.list_(pa.int32(), 4))),  # x0 y0 x1 y1, original pixels, half-open
            pa.field("image_height", pa.int32()),  # pixels of the upright original
            pa.field("image_width", pa.int32()),
            pa.field("geometry", pa.list_(pa.float32(), 4)),  # scale x, scale y, offset x, offset y: see below
            pa.field("status", pa.string(), nullable=False),  # one of STATUSES
            pa.field("error", pa.string()),  # the reason, if status is not ok
        ]
    )


# geometry: a point (x, y) of the network's input, in pixels, lies in the upright original at
# (offset_x + scale_x * x, offset_y + scale_y * y). A map covers the whole input, whatever its grid.


def _hf_feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        length = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
        return {"feature": _hf_feature(kind.value_type), "length": length, "_type": "List"}
    # Arrow prints float32 as `float`; its other names are those of Hugging Face.
    return {"dtype": "float32" if pa.types.is_float32(kind) else str(kind), "_type": "Value"}


def with_metadata(schema: pa.Schema, provenance: dict[str, Any]) -> pa.Schema:
    """Return the schema with metadata: provenance (any JSON), and the features that Hugging Face `datasets` reads."""
    features = {field.name: _hf_feature(field.type) for field in schema}
    return schema.with_metadata(
        {
            METADATA_KEY: json.dumps({"schema_version": SCHEMA_VERSION, **provenance}, sort_keys=True).encode(),
            b"huggingface": json.dumps({"info": {"features": features}}).encode(),
        }
    )


def read_metadata(schema: pa.Schema) -> dict[str, Any]:
    """Return the provenance that `with_metadata` wrote; an empty dict if Saltern did not write the file."""
    raw = (schema.metadata or {}).get(METADATA_KEY)
    try:
        provenance = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        return {}
    return provenance if isinstance(provenance, dict) else {}


Box = tuple[int, int, int, int]
