"""`saltern sanity` on a run: its own method, images and targets; results in the run's folder, made on the engine."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from commands import call, refused
from extracting import extract
from making import HELPERS, Tiny, picture, write_shards, write_tar
from PIL import Image

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.engine.derived import StoppedError
from saltern.pipeline.methods import build
from saltern.pipeline.metrics.sanity import family
from saltern.pipeline.metrics.sanity.cascade import Cascade, cascade
from saltern.pipeline.metrics.sanity.randomise import Randomised, layers_from_the_logits
from saltern.pipeline.metrics.sanity.run import Sanity, SanityRequest, sanity
from saltern.pipeline.metrics.sanity.verdict import RULE
from saltern.pipeline.models import classifiers
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.shards.decode import decode
from saltern.pipeline.shards.samples import read_samples


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(HELPERS)
    write_shards(tmp_path / "in", 3, 4)
    assert extract(tmp_path / "in", tmp_path / "run", method="gradient", layer=None, map_dtype="float32") == 0
    return tmp_path / "run"


def judge(run: Path, images: int = 12, **options: Any) -> Sanity:
    request = SanityRequest(str(run), images, stages=2, batch_size=4, torch_threads=1)
    return sanity(request, RunOptions(str(run), **{"engine": "local", "device": "cpu", **options}))


def results(run: Path) -> dict[str, bytes]:
    kept = [run / "metrics/sanity.json", *(run / "metrics/sanity/data").iterdir()]
    return {path.name: path.read_bytes() for path in kept}


@pytest.mark.slow
def test_the_first_images_are_judged_and_the_results_kept(run: Path) -> None:
    words = ("sanity", run, "--images", "6", "--stages", "2", "--batch-size", "4", "--device", "cpu")
    ended = call(*words)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == RULE
    kept = json.loads((run / "metrics/sanity.json").read_bytes())
    assert (kept["images"], len(kept["stages"]), kept["method"]) == (6, 2, "gradient")
    assert ended.stdout.startswith(f"{kept['verdict']}: area under the rank correlation")
    picture = Image.open(io.BytesIO((run / "metrics/sanity.png").read_bytes()))
    assert (picture.format, picture.size) == ("PNG", (900, 500))
    again = call(*words, "--json")
    assert json.loads(again.stdout) == kept
    assert "2 of 2 shards done, 0 to do" in again.stderr


@pytest.mark.slow
def test_the_rows_are_the_cascades_of_the_runs_maps(run: Path) -> None:
    judge(run)
    opened = open_run(str(run))
    config = opened.config
    model: Tiny = classifiers.load("making:tiny", "DEFAULT", seed=0, side=32).model
    randomised = Randomised(model, layers_from_the_logits(model, 32), seed=0, stages=2)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.preprocess.mean, config.preprocess.std))
    for shard in opened.shards:
        kept = pq.read_table(run / f"metrics/sanity/data/{shard.name}.parquet").to_pylist()
        for sample, row, found in zip(read_samples(shard), opened.read(shard), kept, strict=True):
            pixels = torch.from_numpy(decode(sample.image or b"", config.preprocess).pixels_HWC)
            x_BCHW = ((pixels.permute(2, 0, 1).float() / 255 - mean) / std)[None]
            target_B = torch.tensor([row.target])
            map_1hw = build("gradient", model)(x_BCHW, target_B)
            assert map_1hw[0].numpy() == pytest.approx(row.map(), abs=1e-4)
            one = cascade(model, lambda net: build("gradient", net), x_BCHW, target_B, randomised)
            assert found["key"] == row.key
            assert found["layers"] == [stage.layer for stage in one.stages]
            assert found["entropy_before"] == pytest.approx(float(one.entropy_B), abs=1e-4)
            for name in ("spearman", "absolute", "ssim", "entropy"):
                expected = [float(getattr(stage, f"{name}_B")) for stage in one.stages]
                assert found[name] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_a_stopped_cascade_goes_on_to_equal_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = judge(run).summary
    expected = results(run)
    for path in (run / "metrics").rglob("*.json"):
        path.unlink()
    calls = []

    def interrupted(*words: Any) -> Cascade:
        calls.append(words)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return cascade(*words)

    with monkeypatch.context() as patch:
        patch.setattr(family, "cascade", interrupted)
        with pytest.raises(RuntimeError, match="out of luck"):
            judge(run)
    assert not (run / "metrics/sanity.json").exists()
    monkeypatch.setattr(family, "cascade", lambda *words: (calls.append(words), cascade(*words))[1])
    assert judge(run).summary == whole
    assert len(calls) in (4, 5)  # the shards that were done before were not computed again
    assert results(run) == expected


@pytest.mark.slow
def test_more_images_keep_the_shards_that_are_done(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(family, "cascade", lambda *words: (sizes.append(len(words[2])), cascade(*words))[1])
    few = judge(run, 6).summary
    assert (few["images"], sorted(sizes)) == (6, [2, 4])
    sizes.clear()
    assert judge(run, 99).summary["images"] == 12
    assert sizes == [4, 4]  # the shard that was cut, and the next
    sizes.clear()
    assert judge(run, 6).summary == few
    assert sizes == [2]


@pytest.mark.slow
def test_a_bad_shard_is_named_and_costs_no_other(run: Path, tmp_path: Path) -> None:
    tar = tmp_path / "in/part-000001.tar"
    tar.rename(tmp_path / "elsewhere.tar")
    ended = call("sanity", run, "--images", "12", "--stages", "2", "--device", "cpu")
    assert ended.returncode == 1
    assert f"part-000001: data: {tar} is gone; if the tars were moved, name them with --shards" in ended.stderr
    kept = json.loads((run / "metrics/sanity.json").read_bytes())
    assert (kept["images"], list(kept["unread_shards"])) == (8, ["part-000001"])
    (tmp_path / "elsewhere.tar").rename(tar)
    assert judge(run).summary["images"] == 12


@pytest.mark.slow
def test_moved_tars_are_named(run: Path, tmp_path: Path) -> None:
    expected = judge(run).summary
    (tmp_path / "in").rename(tmp_path / "moved")
    for path in (run / "metrics/sanity/receipts").iterdir():
        path.unlink()
    request = SanityRequest(str(run), 12, stages=2, shards=[str(tmp_path / "moved")], batch_size=4, torch_threads=1)
    assert sanity(request, RunOptions(str(run), engine="local", device="cpu")).summary == expected


def test_errors_name_the_fix(run: Path, tmp_path: Path) -> None:
    for tar in (tmp_path / "in").iterdir():
        tar.unlink()
    assert "--shards" in refused_last(call("sanity", run, "--device", "cpu"))
    assert "saltern extract" in refused(call("sanity", tmp_path / "in"))


def refused_last(ended: Any) -> str:
    """Return the last line of an error that comes after the engine's lines."""
    assert ended.returncode == 2
    return str(ended.stderr.splitlines()[-1])


@pytest.mark.slow
def test_rows_without_a_map_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    images = [b"no image", picture(1), picture(2), picture(3)]
    write_tar(tmp_path / "a.tar", [(f"k{at}", {"jpg": raw, "cls": "1"}) for at, raw in enumerate(images)])
    assert extract(tmp_path / "a.tar", tmp_path / "run") == 0
    assert judge(tmp_path / "run", 2).summary["images"] == 2
    kept = pq.read_table(tmp_path / "run/metrics/sanity/data/a.parquet").to_pylist()
    assert [(row["status"], row["layers"] is None) for row in kept] == [
        ("decode_failed", True), ("ok", False), ("ok", False),
    ]  # fmt: skip


@pytest.mark.slow
def test_workers_of_a_cluster_give_the_same_rows(run: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge(run)
    expected = results(run)
    for path in (run / "metrics/sanity/receipts").iterdir():
        path.unlink()
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    judge(run, engine="ray", address=ray_address, workers=2)
    assert results(run) == expected


@pytest.mark.slow
def test_a_replaced_run_loses_its_results(run: Path, tmp_path: Path) -> None:
    judge(run, 2)
    assert extract(tmp_path / "in", run, {"overwrite": True}, method="grad-cam") == 0
    assert not (run / "metrics").exists()


def test_an_interruption_is_no_result(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*words: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saltern.pipeline.runs.outlet.ShardWriter", interrupt)
    with pytest.raises(StoppedError) as stopped:
        judge(run)
    assert stopped.value.result.code == 1
    assert not (run / "metrics/sanity.json").exists()
