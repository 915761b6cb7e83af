"""The function `extract` makes the same run as the command, and returns its result."""

from pathlib import Path

import pytest
from extracting import extract as run_request
from making import HELPERS, files, picture, write_shards, write_tar

from saltern.pipeline.extract.extraction import extract
from saltern.pipeline.runs.reader import open_run
from saltern.schemas.errors import UserError

OPTIONS = {"layer": "body", "resize": 40, "crop": 32, "batch_size": 4, "torch_threads": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def test_a_call_makes_the_run_of_the_request_and_says_how_it_ended(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 4)
    write_tar(tmp_path / "in" / "odd.tar", [("a", {"jpg": picture(1), "cls": "1"}), ("b", {"jpg": b"no", "cls": "1"})])
    assert run_request(tmp_path / "in", tmp_path / "expected") == 0
    result = extract(tmp_path / "in", tmp_path / "run", model="making:tiny", method="grad-cam", **OPTIONS)
    assert files(tmp_path / "run") == files(tmp_path / "expected")
    assert (result.code, result.shards, result.done, result.failures) == (0, 2, 2, {})
    assert result.rows["decode_failed"] == 1
    assert sum(result.rows.values()) == len(open_run(result.path)) == 6
    again = extract([str(tmp_path / "in")], str(tmp_path / "run"), model="making:tiny", method="grad-cam", **OPTIONS)
    assert again == result


def test_a_broken_shard_is_in_the_result(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 2, 4)
    broken = tmp_path / "in" / "part-000001.tar"
    broken.write_bytes(broken.read_bytes()[:700])
    result = extract(tmp_path / "in", tmp_path / "run", model="making:tiny", method="grad-cam", **OPTIONS)
    assert (result.code, result.done, list(result.failures)) == (1, 1, ["part-000001"])
    assert result.failures["part-000001"].startswith("data: ")


def test_an_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'taget' .*did you mean 'target'"):
        extract(tmp_path / "in", tmp_path / "run", model="making:tiny", method="grad-cam", taget="top1")
