"""Damaged runs: whatever differs from what the tool wrote is a finding of `verify`, and nothing is a traceback."""

import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_run import Made, make_run
from mutate import Fuzz, mutate_bytes, mutate_json

from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.runs.status import run_status
from saltern.pipeline.runs.verify import verify
from saltern.pipeline.show.sheet import contact_sheet
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.receipt import Failure, Receipt

Mutation = Callable[[Path, Random], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a run with a failure, which verify reports as its only finding."""
    made = make_run(tmp_path_factory.mktemp("fuzz"), shards=3, samples=3)
    failures = made.path / "failures/part2/train.json"
    failures.parent.mkdir(parents=True)
    failures.write_bytes(Failure("part2/train", "data", "no tar", 1).to_json())
    (made.path / "receipts/part2/train.json").unlink()
    return made


def findings(path: Path) -> set[str]:
    return {f"{finding.shard}: {finding.reason}" for finding in verify(*load_run_folder(str(path))).findings}


def use(path: Path) -> None:
    """Use a run as the read-only commands do. Errors must be one line."""
    for ask in (
        lambda: run_status(*load_run_folder(str(path))),
        lambda: [(row.map(), row.mask()) for row in open_run(str(path))],
        lambda: open_run(str(path)).rows("s0k0"),
        lambda: contact_sheet(open_run(str(path)), "score", 4),
    ):
        if said := error_of(ask):
            assert "\n" not in said
            assert str(path) in said or "part" in said


def error_of(ask: Callable[[], object]) -> str:
    """Return the error of a call; an empty string if it has none."""
    try:
        ask()
    except (UserError, ShardError) as error:
        return str(error)
    return ""


def rewrite(path: Path, rng: Random) -> None:
    """Write a data file again as Parquet, with other metadata, schema or columns."""
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    position = table.column_names.index(name)
    metadata = dict(table.schema.metadata)
    match rng.randrange(6):
        case 0:
            table = table.drop_columns([name])
        case 1:
            table = table.rename_columns([f"{each}x" if each == name else each for each in table.column_names])
        case 2:
            kind = rng.choice([pa.string(), pa.int64(), pa.list_(pa.int8()), pa.null()])
            table = table.set_column(position, name, pa.nulls(len(table), kind))
        case 3:
            metadata[b"saltern"] = mutate_json(metadata[b"saltern"], rng)
            table = table.replace_schema_metadata(metadata)
        case 4:
            metadata[rng.choice([b"huggingface", b"more"])] = rng.randbytes(8).hex().encode()
            table = table.replace_schema_metadata(metadata)
        case _:
            table = pa.concat_tables([table, table]) if rng.random() < 0.5 else table.slice(1)
    pq.write_table(table, path)


def as_bytes(path: Path, rng: Random) -> None:
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))


def as_json(path: Path, rng: Random) -> None:
    path.write_bytes(mutate_json(path.read_bytes(), rng))


def as_folder(path: Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()


def append(path: Path, rng: Random) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b"\n", b" ", b"\0", b"}"]))


def remove(path: Path, rng: Random) -> None:
    path.unlink()


RECORDS, DATA = "receipts/part0/train.json", "data/part0/train.parquet"
MUTATIONS: dict[str, list[Mutation]] = {
    "run.json": [as_bytes, as_json, as_folder, append, remove],
    RECORDS: [as_bytes, as_json, as_folder, append, remove],
    "failures/part2/train.json": [as_bytes, as_json, as_folder, append, remove],
    DATA: [as_bytes, rewrite, as_folder, append, remove],
}


@pytest.mark.slow
def test_any_change_of_a_run_is_found(made: Made, fuzz: Fuzz, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    untouched = findings(made.path)
    assert untouched == {"part2/train: failed: no tar"}
    for rng in fuzz:
        shutil.copytree(made.path, copy)
        name = rng.choice(list(MUTATIONS))
        before = (copy / name).read_bytes()
        mutate = rng.choice(MUTATIONS[name])
        mutate(copy / name, rng)
        if (copy / name).is_file() and (copy / name).read_bytes() == before:
            shutil.rmtree(copy)
            continue  # the mutation changed nothing
        if said := error_of(lambda: findings(copy)):
            assert str(copy) in said
            assert "\n" not in said
        else:
            assert findings(copy) != untouched, f"{mutate.__name__} of {name} in round {fuzz.rounds} is accepted"
        use(copy)
        shutil.rmtree(copy)
    print(f"{fuzz.rounds} mutated runs")


@pytest.mark.slow
def test_a_data_file_with_a_forged_receipt_is_no_traceback(made: Made, fuzz: Fuzz, tmp_path: Path) -> None:
    """Edited columns or metadata are a finding even then; edited values of a column are known by the digest alone."""
    copy = tmp_path / "copy"
    for rng in fuzz:
        shutil.copytree(made.path, copy)
        mutate = rng.choice([as_bytes, rewrite])
        before = pq.read_table(copy / DATA)
        mutate(copy / DATA, rng)
        raw = (copy / DATA).read_bytes()
        receipt = Receipt.from_json((copy / RECORDS).read_bytes())
        forged = replace(receipt, digest=hashlib.sha256(raw).hexdigest(), data_bytes=len(raw))
        (copy / RECORDS).write_bytes(forged.to_json())
        found = findings(copy)
        if mutate is rewrite and not same(before, raw):
            assert any(line.startswith("part0/train: ") for line in found), f"round {fuzz.rounds}"
        use(copy)
        shutil.rmtree(copy)
    print(f"{fuzz.rounds} mutated data files with forged receipts")


def same(table: pa.Table, raw: bytes) -> bool:
    """Return whether a file has the same columns and metadata."""
    with contextlib.suppress(pa.ArrowException):
        other = pq.read_table(io.BytesIO(raw))
        return bool(other.schema.equals(table.schema, check_metadata=True) and len(other) == len(table))
    return False
