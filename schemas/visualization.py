"""The Parquet schema of a class visualization run: one row for each class, `--batch-size` classes a file."""

import pyarrow as pa


def visualization_schema() -> pa.Schema:
    """Return the columns, in order."""
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),  # the class's number
            pa.field("shard", pa.string(), nullable=False),  # the file's name, as in run.json
            pa.field("index", pa.int32(), nullable=False),  # position in the file, from 0
            pa.field("target", pa.int32()),  # the class
            pa.field("class_name", pa.string()),  # null if the model's class names are unknown
            pa.field("logit", pa.float32()),  # of the class, on the image before it is rounded
            pa.field("score", pa.float32()),  # its softmax probability
            pa.field("objective_start", pa.float32()),  # logit - lambda * ||I||^2, I normalised
            pa.field("objective_end", pa.float32()),
            pa.field("objective", pa.list_(pa.float32())),  # before each step, and after the last
            pa.field("image", pa.binary()),  # PNG: I * std + mean, cut to [0, 1]
            pa.field("status", pa.string(), nullable=False),  # ok | nonfinite
            pa.field("error", pa.string()),  # the reason, if status is not ok
        ]
    )
