"""A run is read with its tars where they are now, and an untrusted run.json names no endpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_run import make_run

from saltern.jobs.show import show
from saltern.pipeline.runs.places import find_shards
from saltern.pipeline.runs.reader import open_run
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard


def test_tars_are_found_where_they_were_moved(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no such file"):
        list(open_run(str(made.path)).joined(made.run.shards[0]))
    run = open_run(str(made.path), [str(tmp_path / "elsewhere")])
    keys = [sample.key for shard in run.shards for sample, _ in run.joined(shard)]
    assert keys == [row.key for row in run]
    show([str(made.path)], shards=[str(tmp_path / "elsewhere")])
    assert (made.path / "show.html").read_text().count("the image cannot be read") == 0


def test_a_tar_of_another_run_is_refused(tmp_path: Path) -> None:
    made = make_run(tmp_path / "one", shards=1)
    other = make_run(tmp_path / "other", shards=1, samples=2)
    with pytest.raises(
        UserError, match=r"is not a shard of .*; the run's .* is .* bytes; copy it again, or name the other tars"
    ):
        open_run(str(made.path), [other.run.shards[0].url])


def test_the_longest_name_wins(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    shard = made.run.shards[0]
    short = replace(shard, name="train", url="/gone/train.tar")
    run = replace(made.run, shards=[short, replace(shard, url="/gone/part0/train.tar")])
    assert list(find_shards("run", run, [shard.url])[0]) == ["part0/train"]


def test_an_endpoint_in_run_json_gets_no_request(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    evil = Shard("part0/train", "s3://bucket?endpoint_override=localhost:1/train.tar", made.run.shards[0].size)
    (made.path / "run.json").write_bytes(replace(made.run, shards=[evil]).to_json())
    run = open_run(str(made.path))
    assert len(list(run)) == 5
    with pytest.raises(ShardError, match="your credentials would go there"):
        list(run.joined(run.shards[0]))
    show([str(made.path)])
    assert "your credentials would go there" in (made.path / "show.html").read_text()
