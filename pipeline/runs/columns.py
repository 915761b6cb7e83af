"""Make Arrow arrays from numpy's, whole columns at once.

Shape suffixes: R rows, N values of a row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Record = dict[str, Any]  # one row by column name; a column that is absent is null
_BOX = pa.list_(pa.int32(), 4)


def numbers(values_R: NDArray[Any], kind: pa.DataType, null_R: NDArray[np.bool_] | None = None) -> pa.Array:
    """Return a column of numbers. NaN is a number."""
    return pa.array(values_R, kind, mask=null_R, from_pandas=False)


def binary(raw_RN: NDArray[Any], kind: pa.DataType, null_R: NDArray[np.bool_]) -> pa.Array:
    """Return a column of bytes, a row of the array each. The array is shared if it is contiguous."""
    rows, data = len(raw_RN), np.ascontiguousarray(raw_RN).reshape(-1).view(np.uint8)
    valid = pa.py_buffer(np.packbits(~null_R, bitorder="little"))
    if pa.types.is_fixed_size_binary(kind):
        return pa.Array.from_buffers(kind, rows, [valid, pa.py_buffer(data)])
    offsets = np.arange(rows + 1, dtype=np.int32) * (len(data) // max(rows, 1))
    return pa.Array.from_buffers(kind, rows, [valid, pa.py_buffer(offsets), pa.py_buffer(data)])


def fixed_lists(values_RN: NDArray[Any], kind: pa.FixedSizeListType) -> pa.Array:
    """Return a column of lists, a row of the array each."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values_RN.reshape(-1), kind.value_type), kind.list_size)


def box_lists(boxes_R4: NDArray[Any], empty_R: NDArray[np.bool_], null_R: NDArray[np.bool_]) -> pa.Array:
    """Return a column of lists of boxes: none in empty rows, one in the others."""
    some_R = ~(empty_R | null_R)
    offsets = np.concatenate([[0], np.cumsum(some_R)])
    boxes = fixed_lists(boxes_R4[some_R], _BOX)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), boxes, mask=pa.array(null_R))


def fill(columns: Mapping[str, pa.Array], rows: int, schema: pa.Schema) -> pa.RecordBatch:
    """Return the columns in the schema's order. A column that is absent is null in every row."""
    every = [columns[field.name] if field.name in columns else pa.nulls(rows, field.type) for field in schema]
    return pa.record_batch(every, schema=schema)


def from_records(records: list[Record], schema: pa.Schema) -> pa.RecordBatch:
    """Return records as a batch, for a few rows."""
    every = [pa.array([record.get(field.name) for record in records], field.type) for field in schema]
    return pa.record_batch(every, schema=schema)
