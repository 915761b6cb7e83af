"""The overlap of maps with an attack's changes, against a loop, and of an attack run."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from counted import use_counted
from making import HELPERS, picture, write_shards, write_tar
from PIL import Image
from scipy.stats import spearmanr
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.metrics.sanity.adversarial import overlap
from saltern.pipeline.metrics.sanity.run import Sanity, SanityRequest, sanity
from saltern.pipeline.synthesis.attack import AttackRequest, attacking
from saltern.schemas.config import PGD
from saltern.schemas.errors import UserError


def test_overlap_is_the_share_of_the_most_changed_pixels_among_the_most_salient() -> None:
    generator = torch.Generator().manual_seed(0)
    map_BHW, change_BHW = (torch.rand(5, 20, 30, generator=generator) for _ in range(2))
    found = overlap(map_BHW, change_BHW, 0.1)
    for number in range(5):
        salient = set(map_BHW[number].flatten().argsort(descending=True)[:60].tolist())
        changed = set(change_BHW[number].flatten().argsort(descending=True)[:60].tolist())
        assert float(found.overlap_B[number]) == pytest.approx(len(salient & changed) / 60)


def test_equal_values_at_the_border_count_in_part() -> None:
    """Four of eight pixels are wanted; two are higher and four share the border's value: each counts half."""
    map_1HW = torch.tensor([[[9.0, 9, 5, 5], [5, 5, 0, 0]]])
    change_1HW = torch.tensor([[[8.0, 0, 7, 6], [0, 0, 5, 0]]])
    assert float(overlap(map_1HW, change_1HW, 0.5).overlap_B) == pytest.approx((1 + 0.5 + 0.5) / 4)
    same = overlap(map_1HW, torch.zeros(1, 2, 4), 0.5)
    assert float(same.overlap_B) == pytest.approx(0.5)  # by chance
    assert float(same.spearman_B) == 0


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three shards with three images each; the second image of the first is broken. It has no tars."""
    folder = tmp_path_factory.mktemp("attacked")
    for shard in range(3):
        images = [b"no image" if (shard, at) == (0, 1) else picture(3 * shard + at) for at in range(3)]
        write_tar(folder / f"in/{shard}.tar", [(f"k{at}", {"jpg": image}) for at, image in enumerate(images)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HELPERS)
        attack(folder / "in", folder / "run")
    shutil.rmtree(folder / "in")
    return folder / "run"


@pytest.fixture
def run(attacked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(attacked, tmp_path / "run"))


def attack(shards: Path, out: Path, **wishes: Any) -> None:
    request = AttackRequest(
        [str(shards)], "making:tiny", "grad-cam", layer="body", resize=40, crop=32, batch_size=4,
        torch_threads=1, pgd=PGD(3, 2 / 255, 12 / 255, 1.0), **wishes,
    )  # fmt: skip
    assert conduct(attacking(request), RunOptions(str(out), device="cpu", engine="local")).code == 0


def judge(run: Path, images: int = 99, **options: Any) -> Sanity:
    request = SanityRequest(str(run), images, batch_size=2, torch_threads=1)
    return sanity(request, RunOptions(str(run), **{"engine": "local", "device": "cpu", **options}))


def results(run: Path) -> dict[str, bytes]:
    kept = [run / "metrics/sanity.json", *(run / "metrics/adversarial/data").iterdir()]
    return {path.name: path.read_bytes() for path in kept}


@pytest.mark.slow
def test_an_attack_run_is_judged_by_its_pictures(run: Path) -> None:
    found = judge(run)
    values = []
    for shard in range(3):
        kept = pq.read_table(run / f"metrics/adversarial/data/{shard}.parquet").to_pylist()
        for row, own in zip(pq.read_table(run / f"data/{shard}.parquet").to_pylist(), kept, strict=True):
            assert (own["key"], own["shard"], own["index"]) == (row["key"], str(shard), row["index"])
            if row["status"] != "ok":
                assert (own["status"], own["overlap"], own["spearman"]) == (row["status"], None, None)
                continue
            image, plain, map_ = (
                np.asarray(Image.open(io.BytesIO(row[name]))).astype(int) for name in ("image", "plain_image", "map")
            )
            change = np.abs(plain - image).sum(2)
            one = overlap(torch.from_numpy(map_)[None], torch.from_numpy(change)[None])
            correlation = spearmanr(map_.ravel(), change.ravel()).statistic
            assert (own["overlap"], own["spearman"]) == pytest.approx((float(one.overlap_B), correlation))
            values.append([own["overlap"], own["spearman"]])
    summary = found.summary["adversarial"]
    assert summary["images"] == len(values) == 8
    for at, name in enumerate(("overlap", "spearman")):
        own = np.array(values)[:, at]
        around = 1.96 * own.std(ddof=1) / np.sqrt(len(own))
        assert summary[name] == pytest.approx({"value": own.mean(), "plus_minus": around})
    assert json.loads((run / "metrics/sanity.json").read_text()) == found.summary


@pytest.mark.slow
def test_only_what_is_missing_is_judged_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = judge(run, 4).summary
    assert few["adversarial"]["images"] == 4  # two of the first shard, and two of the second
    kept = pq.read_table(run / "metrics/adversarial/data/1.parquet")
    assert kept["index"].to_pylist() == [0, 1]
    assert not (run / "metrics/adversarial/data/2.parquet").exists()
    whole = judge(run).summary
    expected = results(run)
    (run / "metrics/adversarial/receipts/1.json").unlink()
    capsys.readouterr()
    assert judge(run).summary == whole
    assert "2 of 3 shards done, 1 to do" in capsys.readouterr().err
    assert results(run) == expected


@pytest.mark.slow
def test_each_data_file_is_read_by_its_worker_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = judge(run).summary
    shutil.rmtree(run / "metrics")
    store = use_counted(monkeypatch)
    assert judge(run).summary == expected
    opened = {path.removeprefix(f"{run}/"): count for path, count in store.opened.items() if "/data/" in path}
    names = [f"{shard}.parquet" for shard in range(3)]
    assert opened == {f"{folder}data/{name}": 1 for folder in ("", "metrics/adversarial/") for name in names}


@pytest.mark.slow
def test_a_damaged_data_file_is_named_and_costs_no_other(run: Path) -> None:
    path = run / "data/1.parquet"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    ended = CliRunner().invoke(app, ["sanity", str(run), "--images", "99", "--engine", "local", "--device", "cpu"])
    assert ended.exit_code == 1
    assert ended.stdout.startswith("5 images: ")
    assert f"1: data: {path} cannot be read" in ended.stderr
    assert list(json.loads((run / "metrics/sanity.json").read_text())["unread_shards"]) == ["1"]
    path.write_bytes(whole)
    assert judge(run).summary["adversarial"]["images"] == 8


@pytest.mark.slow
def test_workers_of_a_cluster_give_the_same_rows(run: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge(run)
    expected = results(run)
    shutil.rmtree(run / "metrics")
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    judge(run, engine="ray", address=ray_address, workers=2)
    assert results(run) == expected


@pytest.mark.slow
def test_an_attack_without_pictures_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    write_shards(tmp_path / "in", 1, 2)
    attack(tmp_path / "in", tmp_path / "bare", save_images=False)
    with pytest.raises(UserError, match="no pictures"):
        judge(tmp_path / "bare")
    assert not (tmp_path / "bare/metrics").exists()
