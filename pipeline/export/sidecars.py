"""Export as WebDataset tars that go with the input shards: equal keys in equal order."""

import io
import re
import tarfile

import numpy as np

from saltern.pipeline.export.facts import samples, to_json, values
from saltern.pipeline.export.folder import Folder
from saltern.pipeline.export.pictures import png
from saltern.pipeline.runs.reader import Row, SaliencyRun
from saltern.schemas.run import Shard

_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f])")


def write_sidecar(folder: Folder, run: SaliencyRun, shard: Shard) -> int:
    """Write `<shard>.tar` with the members `map.npy`, `mask.png` and `saliency.json` of each sample.

    A run of several targets numbers them by rank: `map.0.npy`, `map.1.npy`, ... A row without a map or a mask has only
    its json, so that each sample of the input has one here.

    Returns:
        The number of rows.
    """
    ranked, rows = run.config.target.kind == "top", 0
    with (
        folder.file(f"{shard.name}.tar") as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for group in samples(run, shard):
            for rank, row in enumerate(group):
                _add(tar, row, f".{rank}" if ranked else "")
            rows += len(group)
    return rows


def _add(tar: tarfile.TarFile, row: Row, rank: str) -> None:
    contents: dict[str, bytes] = {}
    if row.map_bytes is not None:
        stream = io.BytesIO()
        np.save(stream, row.map())
        contents[f"map{rank}.npy"] = stream.getvalue()
    if row.mask_bytes is not None:
        contents[f"mask{rank}.png"] = png(row.mask())
    contents[f"saliency{rank}.json"] = to_json(values(row))
    # The bytes of a key that are not UTF-8 are stored as \xNN; the tar has the bytes.
    key = _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), row.key)
    for ext, content in contents.items():
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
