"""Full memory in any clothing halves the batch; a lost device costs its worker, and never the run."""

from pathlib import Path
from typing import Any

import casm_toys
import faulty
import numpy as np
import pytest
from images import encoded
from making import HELPERS, PYTHONPATH, files, picture, write_tar

from saltern.pipeline.casm.training.train import train
from saltern.pipeline.device import device_lost, out_of_memory
from saltern.pipeline.engine.conduct import RunResult
from saltern.pipeline.extract.extraction import extract
from saltern.pipeline.runs.manifest import load_run_folder, read_receipts
from saltern.pipeline.runs.verify import verify
from saltern.schemas.errors import UserError

BLACK = encoded(np.zeros((50, 50, 3), np.uint8))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)  # of actors
    (tmp_path / "left").write_text("0")


def run(shards: Path, out: Path, method: str, **more: Any) -> RunResult:
    settings = {"device": "cpu", "engine": "local", "torch_threads": 1, "batch_size": 4, "target": "top1"}
    settings["options"] = {"folder": str(out.parent)}
    return extract(shards, out, model="making:tiny", method=method, resize=40, crop=32, **{**settings, **more})


def write_shards(folder: Path, count: int, black: int) -> Path:
    """Write shards of four images, one of which is black in the shard `black`."""
    for shard in range(count):
        images = [picture(4 * shard + number) for number in range(4)]
        images[1] = BLACK if shard == black else images[1]
        samples = [(f"s{shard}-{number}", {"jpg": image}) for number, image in enumerate(images)]
        write_tar(folder / f"part-{shard}.tar", samples)
    return folder


@pytest.mark.parametrize("name", ["driver", "cublas handle", "cudnn plan", "host", "python"])
def test_full_memory_halves_the_batch(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "which").write_text(name)
    shards = write_shards(tmp_path / "in", 1, black=-1)
    assert run(shards, tmp_path / "run", "faulty:Full").rows == {"ok": 4}
    assert [it.batch_size for it in read_receipts(*load_run_folder(str(tmp_path / "run"))).values()] == [2]
    assert "memory ran out: 1 of 1 shards were computed in batches of 2, not of 4" in capsys.readouterr().err


def test_errors_are_known_by_their_class_or_message() -> None:
    assert [name for name, error in faulty.FULL.items() if not out_of_memory(error)] == []
    assert [name for name, error in faulty.FULL.items() if device_lost(error)] == ["cublas handle"]  # with one image
    assert [name for name, error in faulty.LOST.items() if not device_lost(error) or out_of_memory(error)] == []


def test_messages_with_other_causes_are_no_full_memory_for_a_single_image() -> None:
    ambiguous = {name for name, error in faulty.FULL.items() if not out_of_memory(error, alone=True)}
    assert ambiguous == {"cublas handle", "cudnn engine", "cudnn plan"}
    for error in (RuntimeError("shapes (2, 3) and (4, 5) cannot be multiplied"), ValueError("out of memory")):
        assert not out_of_memory(error)
        assert not device_lost(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerator", "cudnn", "nccl"])
def test_a_lost_device_ends_a_local_run_that_the_same_command_continues(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "which").write_text(name)
    (tmp_path / "left").write_text("1")
    shards = write_shards(tmp_path / "in", 3, black=0)
    first = run(shards, tmp_path / "run", "faulty:Lost")
    assert (first.code, first.stuck) == (75, True)
    said = [line for line in capsys.readouterr().err.splitlines() if "lost its device" in line]
    assert len(said) == 1
    assert "repeat the command to resume" in said[0]
    assert run(shards, tmp_path / "run", "faulty:Lost").rows == {"ok": 12}
    assert run(shards, tmp_path / "mean", "faulty:Lost").code == 0
    assert files(tmp_path / "run") == files(tmp_path / "mean")
    assert verify(*load_run_folder(str(tmp_path / "run"))).findings == []
    assert not list((tmp_path / "run/failures").glob("*"))


def test_a_shard_that_always_loses_the_device_comes_last_and_ends_with_another_code(tmp_path: Path) -> None:
    (tmp_path / "which").write_text("accelerator")
    (tmp_path / "left").write_text("99")
    shards = write_shards(tmp_path / "in", 4, black=0)
    results = [run(shards, tmp_path / "run", "faulty:Lost") for _ in range(4)]
    assert [result.code for result in results] == [75, 75, 1, 1]
    first, second, *others = (result.done for result in results)
    assert first < 2 <= second  # a shard beside the one that fails may be finished before the process ends
    assert others == [3, 3]
    (tmp_path / "left").write_text("0")  # another card
    assert run(shards, tmp_path / "run", "faulty:Lost").rows == {"ok": 16}


def test_a_lost_device_costs_an_actor_and_never_the_run(tmp_path: Path, ray_address: str) -> None:
    (tmp_path / "which").write_text("accelerator")
    (tmp_path / "left").write_text("1")
    shards = write_shards(tmp_path / "in", 3, black=0)
    result = run(shards, tmp_path / "run", "faulty:Lost", engine="ray", address=ray_address, workers=1)
    assert (result.code, result.rows) == (0, {"ok": 12})
    assert int((tmp_path / "left").read_text()) == 0


def test_a_training_that_loses_its_device_names_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    casm_toys.interrupt(monkeypatch, 5, lambda: faulty.LOST["accelerator"])
    request = casm_toys.request(casm_toys.write_shards(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(UserError, match=r"illegal memory access.*the checkpoint of step 4 is complete"):
        train(request, casm_toys.quiet)
