"""The columns of a run are, byte for byte, the file that its records give one by one."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from extracting import extract
from making import HELPERS, files, picture, write_tar
from naive_rows import Record, extract_records, write_records

from saltern.pipeline.extract.batch import Batch
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.task import Explained
from saltern.schemas.run import Shard


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def odd_shard(path: Path, count: int) -> Path:
    """Write samples of all kinds: good, without image or label, broken, of various shapes, and with repeated keys."""
    samples: list[tuple[str, dict[str, bytes | str]]] = []
    for i in range(count):
        members: dict[str, bytes | str] = {"jpg": picture(i, 40 + i % 7, 60 - i % 5), "cls": str(i % 5)}
        if i % 9 == 4:
            members["jpg"] = b"no image"
        if i % 10 == 3:
            del members["cls"]
        if i % 11 == 5:
            del members["jpg"]
            members["txt"] = "x"
        samples.append((f"k{i if i % 13 else 0:04}ü", members))
    return write_tar(path, samples)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"target": "top:3", "map_dtype": "uint8", "batch_size": 3},
        {"target": "top1", "save_map": False, "batch_size": 100},
        {"method": "odd_methods:Odd", "layer": None, "map_dtype": "float16"},
        {"method": "odd_methods:Agnostic", "layer": None, "map_dtype": "uint8", "map_size": "input"},
    ],
    ids=str,
)
def test_files_equal_those_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wishes: dict[str, Any]) -> None:
    records: dict[str, list[Record]] = {}
    schemas: list[pa.Schema] = []
    wanted = {"map", "map_lo", "map_hi"} if wishes.get("map_dtype") == "uint8" else {"map"}
    rows = Extraction.rows

    def record(task: Extraction, shard: Shard, batch: Batch, explained: Explained | None) -> pa.RecordBatch:
        own = extract_records(shard.name, batch, explained, (32, 32), wanted if wishes.get("save_map", True) else ())
        records.setdefault(shard.name, []).extend(own)
        schemas.append(task.schema)
        return rows(task, shard, batch, explained)

    monkeypatch.setattr(Extraction, "rows", record)
    for name, count in (("a", 200), ("b", 7)):  # with three rows a sample, more than a row group
        odd_shard(tmp_path / "in" / f"{name}.tar", count)
    extract(tmp_path / "in", tmp_path / "run", **wishes)  # exits with 1 if most rows are not ok
    made = files(tmp_path / "run")
    for name, own in records.items():
        expected = write_records(tmp_path / "expected.parquet", own, schemas[0]).read_bytes()
        assert made[f"data/{name}.parquet"] == expected
    assert len({record["status"] for record in records["a"]}) > 3
