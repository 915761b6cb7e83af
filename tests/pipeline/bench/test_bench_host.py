"""`bench host` measures the real reader and writer, and the share of samples in which a thread held the GIL."""

import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from saltern.pipeline.bench import host
from saltern.pipeline.bench.host import HostBench, measure
from saltern.pipeline.extract.processor import Processor

BENCH = HostBench(batch_size=8, rounds=1, image_bytes=(5_000,), shards=2, each=20, seconds=1, sampler=None)
# Replaces py-spy: of 500 samples of threads that ran, 100 are of one that held the GIL.
SPY = """#!{python}
import sys
samples = "a (x.py:1);b (y.py:2) 70\\na (x.py:1) 30\\n" + "c (z.py:3) 400\\n" * ("--gil" not in sys.argv)
open(sys.argv[sys.argv.index("--output") + 1], "w").write(samples)
"""


def test_without_py_spy_only_the_rate_is_measured() -> None:
    rate, gil = measure(BENCH)
    assert rate.value is not None
    assert rate.value > 0
    assert "5 kB" in rate.name
    assert (gil.value, gil.note) == (None, "py-spy is not installed (pip install py-spy)")


def test_the_time_under_the_gil_is_a_share_of_the_samples(tmp_path: Path) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text(SPY.format(python=sys.executable))
    spy.chmod(0o755)
    _, gil = measure(replace(BENCH, sampler=str(spy)))
    assert gil.value is not None
    assert "20% of" in gil.note
    assert "100 of 500 samples" in gil.note
    each = float(gil.note.split(" us of CPU")[0].rpartition(" ")[2])
    assert gil.value == pytest.approx(0.2 * each, abs=0.1)


def test_a_sampler_that_fails_is_named(tmp_path: Path) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\necho Permission denied >&2; exit 1\n")
    spy.chmod(0o755)
    _, gil = measure(replace(BENCH, sampler=str(spy)))
    assert (gil.value, gil.note) == (None, "py-spy failed: Permission denied")


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
