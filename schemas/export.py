"""The Parquet schema of an export's records, in its folder RECORDS: what was written for each shard."""

import pyarrow as pa

from saltern.schemas.choices import ExportFormat

RECORDS = ".export"  # folder of run.json, receipts and records

_FILES = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),  # its name in the export's folder
        pa.field("bytes", pa.int64(), nullable=False),
    ]
)
# Parts of instances.json: JSON texts, whose ids are given when the parts are joined.
_IMAGES = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("annotations", pa.list_(pa.string()), nullable=False),
        pa.field("classless", pa.bool_(), nullable=False),  # an annotation is of a map that explains no class
    ]
)


def export_schema(form: str) -> pa.Schema:
    """Return the columns of an export's records: a row for each file of a shard; of `coco`, for each image."""
    return _IMAGES if form == ExportFormat.coco else _FILES
