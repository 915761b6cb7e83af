"""`bench host` measures the real reader and writer, and the CPU time under the GIL."""

import dataclasses

import pyarrow.parquet as pq
import pytest

from saltern.pipeline.bench import host
from saltern.pipeline.bench.gil import Unmeasurable
from saltern.pipeline.bench.host import HostBench, measure
from saltern.pipeline.extract.processor import Processor

BENCH = HostBench(batch_size=8, rounds=3, image_bytes=(5_000,), shards=2, each=20)


def test_the_rate_and_the_time_under_the_lock_are_measured() -> None:
    many = dataclasses.replace(BENCH, each=400)  # the kernel looks at the timers every 1 to 4 ms of CPU time only
    rate, gil = measure(many)
    assert rate.value is not None
    assert rate.value > 0
    assert "5 kB" in rate.name
    assert gil.value is not None
    assert len(gil.rounds["us"]) == 3
    assert 0 < gil.value < float(rate.note.partition(" us of CPU")[0])


def test_without_a_compiler_only_the_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise Unmeasurable("no C compiler is installed")

    monkeypatch.setattr(host, "watched", refuse)
    rate, gil = measure(BENCH)
    assert rate.value is not None
    assert (gil.value, gil.note) == (None, "no C compiler is installed")


def test_the_whole_pipeline_works_on_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is read and has a row with a mask and, for almost all, a box."""
    tables = []
    process = Processor.process

    def kept(processor: Processor, *given: object) -> object:
        made = process(processor, *given)  # type: ignore[arg-type]
        tables.append(pq.read_table(next(processor._outlets[""]._folder.rglob(next(iter(made.files.values()))))))
        return made

    monkeypatch.setattr(Processor, "process", kept)
    list(measure(BENCH))
    assert {table.num_rows for table in tables} == {20}
    for row in tables[0].to_pylist():
        assert row["status"] == "ok"
        assert row["mask"]
        assert row["boxes"]
    assert len({row["mask"] for row in tables[0].to_pylist()}) == 8  # one for each image of a batch
    assert host.Blobs.__name__ in str(tables[0].schema.metadata)
