"""Other tools read a run unchanged: values, lists, nulls and bytes all come back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from made_run import CROP, Made, make_run, write_shard

from saltern.pipeline.maps.encode import dequantise
from saltern.pipeline.runs.reader import open_run
from saltern.schemas.saliency import STATUSES, read_metadata, table_schema, with_metadata

NAMES = table_schema(None).names
Record = dict[str, Any]


@pytest.fixture(scope="module", params=["native float16", "input uint8", "no map"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Make a run with shards in folders, two targets, failed rows and an empty shard."""
    changes: dict[str, dict[str, Any]] = {
        "native float16": {"map_dtype": "float16", "grid": (4, 3)},
        "input uint8": {"map_dtype": "uint8", "grid": (CROP, CROP)},
        "no map": {"save_map": False},
    }
    folder = tmp_path_factory.mktemp("interop")
    found = make_run(folder, targets=2, broken=((0, 0), (2, 1)), **changes[request.param])
    write_shard(found, 1, 0, [], changes[request.param].get("grid", (4, 4)))
    return found


@pytest.fixture(scope="module")
def expected(made: Made) -> list[Record]:
    rows = open_run(str(made.path))
    renamed = {"map": "map_bytes", "mask": "mask_bytes"}
    return [{name: getattr(row, renamed.get(name, name)) for name in NAMES} for row in rows]


def pattern(made: Made) -> str:
    return str(made.path / "data" / "**" / "*.parquet")


def check(found: list[Record], expected: list[Record]) -> None:
    """Compare row by row. NaN counts as null if the tool has no null."""
    order = {row["shard"]: number for number, row in enumerate(expected)}
    found = sorted(found, key=lambda row: order[row["shard"]])  # folders come in any order, rows within a file do not
    assert len(found) == len(expected) == 18
    for row, right in zip(found, expected, strict=True):
        assert list(row) == NAMES
        for name, value in right.items():
            assert plain(row[name]) == value, (name, right["key"])


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    return None if value is None or value != value else value


def test_the_bytes_are_maps(made: Made, expected: list[Record]) -> None:
    """numpy decodes the bytes with the file's metadata. The tools below are compared to this."""
    provenance = read_metadata(pq.read_schema(made.data(0)))
    right = [row for row in expected if row["status"] == "ok"]
    assert len(right) == 16
    for row in right:
        place = (row["shard"], row["key"], row["target"] - row["label"])
        bits = np.unpackbits(np.frombuffer(row["mask"], np.uint8)).reshape(provenance["input_shape"])
        assert np.array_equal(bits, made.masks[place])
        if provenance["map_shape"] is None:
            assert row["map"] is None
            continue
        shape = (row["map_height"], row["map_width"])
        assert list(shape) == provenance["map_shape"]
        map_hw = dequantise(row["map"], provenance["map_dtype"], shape, row["map_lo"], row["map_hi"])
        assert np.abs(map_hw - made.maps[place]).max() < 0.01


def test_pyarrow_file_and_folder(made: Made, expected: list[Record]) -> None:
    check([row for number in range(3) for row in pq.read_table(made.data(number)).to_pylist()], expected)
    folder = ds.dataset(made.path / "data", format="parquet")
    check(folder.to_table().to_pylist(), expected)
    assert folder.count_rows(filter=pc.field("status") != "ok") == 2


def test_duckdb(made: Made, expected: list[Record]) -> None:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as database:
        files = "FROM read_parquet(?)"
        found = database.execute(f"SELECT * {files}", [pattern(made)])
        assert [column[0] for column in found.description] == NAMES
        check([dict(zip(NAMES, row, strict=True)) for row in found.fetchall()], expected)
        counted = database.execute(f"SELECT status, count(*) {files} GROUP BY 1 ORDER BY 1", [pattern(made)])
        assert counted.fetchall() == [("decode_failed", 2), ("ok", 16)]
        widest = database.execute(f"SELECT max(boxes[1][3] - boxes[1][1]) {files}", [pattern(made)])
        assert widest.fetchall() == [(max(x1 - x0 for row in expected for x0, _, x1, _ in row["boxes"] or ()),)]


@pytest.mark.slow
def test_polars(made: Made, expected: list[Record]) -> None:
    polars = pytest.importorskip("polars")
    check(polars.read_parquet(pattern(made)).to_dicts(), expected)
    lazy = polars.scan_parquet(pattern(made)).filter(polars.col("status") == "ok").select(polars.col("score").max())
    assert lazy.collect().item() == max(row["score"] or 0 for row in expected)


def test_pandas(made: Made, expected: list[Record]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(made.path / "data")
    assert list(frame.columns) == NAMES
    check(frame.to_dict("records"), expected)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Import Hugging Face datasets, offline and with its own home; it reads the environment at import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        library = pytest.importorskip("datasets")
        library.disable_progress_bars()
        yield library


@pytest.mark.slow
def test_datasets(made: Made, expected: list[Record], datasets: Any, tmp_path: Path) -> None:
    loaded = datasets.load_dataset("parquet", data_files=pattern(made), split="train", cache_dir=str(tmp_path))
    check(list(loaded), expected)
    schema = pq.read_schema(made.data(0))
    assert loaded.features.arrow_schema.remove_metadata().types == schema.types
    single = datasets.Dataset.from_parquet(str(made.data(0)), cache_dir=str(tmp_path))
    assert list(single) == [row for row in expected if row["shard"] == "part0/train"]
    streamed = datasets.load_dataset("parquet", data_files=pattern(made), split="train", streaming=True)
    check(list(streamed), expected)


@pytest.mark.parametrize("map_bytes", [98, None])
def test_our_features_are_those_that_datasets_derives(datasets: Any, map_bytes: int | None) -> None:
    schema = with_metadata(table_schema(map_bytes), {})
    ours = datasets.Features.from_dict(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
    assert ours == datasets.Features.from_arrow_schema(schema.remove_metadata())
    assert list(ours) == NAMES


def test_the_provenance_survives_each_file(made: Made) -> None:
    for number in range(3):
        found = read_metadata(pq.read_schema(made.data(number)))
        assert found["fingerprint"] == made.run.fingerprint
        assert found["schema_version"] == 1
        assert found["mask_bit_order"] == "big"
        assert found["config"]["method"] == "grad-cam"
    assert read_metadata(table_schema(None)) == {}
    assert set(STATUSES) >= {"ok", "decode_failed"}
