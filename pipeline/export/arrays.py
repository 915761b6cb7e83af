"""Export as NumPy arrays, one of all maps and one of all masks of a shard, which `np.load` can map into memory."""

from contextlib import ExitStack
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.export.facts import to_json, values
from saltern.pipeline.export.folder import Folder
from saltern.pipeline.runs.manifest import read_receipt
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.schemas.errors import ShardError
from saltern.schemas.run import Shard


def write_arrays(folder: Folder, run: SaliencyRun, shard: Shard) -> int:
    """Write `<shard>.map.npy`, `<shard>.mask.npy` and `<shard>.json`, whose entries are the rows in one order.

    Maps are float32 (rows, h, w) in the method's unit and grid, NaN in rows without one. Masks are bool (rows, H, W)
    at the network's input. There is no file of what no row has.

    Returns:
        The number of rows.
    """
    expected = read_receipt(run.store, run.run, shard.name).rows
    rows = 0
    with ExitStack() as stack:
        map_ = _Array(folder, stack, f"{shard.name}.map.npy", expected, np.dtype(np.float32))
        mask = _Array(folder, stack, f"{shard.name}.mask.npy", expected, np.dtype(np.bool_))
        listing = stack.enter_context(folder.file(f"{shard.name}.json"))
        for row in run.read(shard):
            map_.add(None if row.map_bytes is None else row.map())
            mask.add(None if row.mask_bytes is None else row.mask())
            listing.write((b",\n" if rows else b"[") + to_json(values(row)))
            rows += 1
        listing.write(b"]\n" if rows else b"[]\n")
        if rows != expected:
            raise ShardError(f"its data file has {rows} rows, its receipt says {expected}; `saltern verify` says more")
    return rows


class _Array:
    """A .npy file of a known number of entries, made when the first of them is known; None is an entry of NaN or 0."""

    def __init__(self, folder: Folder, stack: ExitStack, name: str, rows: int, kind: np.dtype[Any]):
        self._folder, self._stack, self._name, self._rows, self._kind = folder, stack, name, rows, kind
        self._stream: IO[bytes] | None = None
        self._absent = b""
        self._before = 0  # entries of None before the first

    def add(self, entry: NDArray[Any] | None) -> None:
        if entry is not None:
            self._stream = self._stream or self._begin(entry.shape)
            self._stream.write(entry.astype(self._kind).tobytes())
        elif self._stream is not None:
            self._stream.write(self._absent)
        else:
            self._before += 1

    def _begin(self, shape: tuple[int, ...]) -> IO[bytes]:
        empty = np.nan if self._kind.kind == "f" else 0
        self._absent = np.full(shape, empty, self._kind).tobytes()
        stream = self._stack.enter_context(self._folder.file(self._name))
        header = {"descr": self._kind.str, "fortran_order": False, "shape": (self._rows, *shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        for _ in range(self._before):
            stream.write(self._absent)
        return stream
