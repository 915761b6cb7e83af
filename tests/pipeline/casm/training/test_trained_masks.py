"""The masks of a training, by the method and by an extraction."""

import json
import shutil
from contextlib import redirect_stderr
from functools import partial
from io import StringIO

import casm_toys
import pyarrow.parquet as pq
import pytest
import torch
from casm_toys import SIDE, CutError, files, interrupt, quiet, request, small

from saltern.pipeline import methods
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.pipeline.casm.training.train import train
from saltern.pipeline.engine.conduct import Job, RunOptions, conduct
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.masknet import checkpoint
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.slow
def test_masks_are_the_trained_networks(undisturbed, shards):
    found = checkpoint.open_checkpoint(undisturbed)
    trained = Training(small(), request(shards, undisturbed).hyperparameters)
    trained.load_state_dict(found.state())
    x = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with methods.build("casm", model, checkpoint=str(undisturbed)) as method:
        map_Bhw = method(x)
        torch.testing.assert_close(map_Bhw, trained.masks(x)[:, 0], rtol=0, atol=0)
        assert map_Bhw.std() > 1e-3
        with torch.no_grad():
            torch.testing.assert_close(method.last.logits_BK, trained.classifier.eval()(x))
        single = torch.cat([method(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(single, map_Bhw, rtol=1e-5, atol=1e-6)
        assert method.last.target_B is None
        assert method.options == {"checkpoint": str(undisturbed / "checkpoints/18"), "digest": found.digest}
        with torch.autocast("cpu", torch.bfloat16):
            assert (method(x) - map_Bhw).abs().max() < 0.05
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with methods.build("casm", small().double(), checkpoint=str(undisturbed)) as method:
        torch.testing.assert_close(method(x.double()), map_Bhw, rtol=1e-4, atol=1e-5)


def test_wrong_checkpoints_are_refused(undisturbed, tmp_path):
    for path, match in ((undisturbed / "no", "holds no checkpoint"), ("", "-O checkpoint=DIR")):
        with pytest.raises(UserError, match=match):
            methods.build("casm", small(), checkpoint=str(path))
    with pytest.raises(UserError, match=r"trained on casm_toys:small\) does not fit Small; of another shape"):
        methods.build("casm", casm_toys.other(), checkpoint=str(undisturbed))
    with pytest.raises(UserError, match="is not the checkpoint of this run"):
        methods.build("casm", small(), checkpoint=str(undisturbed), digest="0" * 64)


@pytest.mark.slow
def test_a_subset_of_the_classes_and_an_encoder_of_its_own(shards, tmp_path):
    how = Hyperparameters(thinning=THINNINGS["L"], share_encoder=False)
    train(request(shards, tmp_path, classes=[4, 1], epochs=1, hyperparameters=how), quiet)
    x = torch.randn(2, 3, SIDE, SIDE)
    with methods.build("casm", small(), checkpoint=str(tmp_path)) as method:
        assert method(x).shape == (2, 16, 16)
        logits_BK = method.last.logits_BK
    assert set(logits_BK.argmax(1).tolist()) <= {1, 4}
    assert (logits_BK[:, [0, 2, 3, 5]] == -1e4).all()


def test_extract_gives_rows_without_target(undisturbed, shards, tmp_path):
    trained = shutil.copytree(undisturbed, tmp_path / "casm")  # a run marks the checkpoint that it uses
    wanted = ExtractRequest(
        [str(shards)], "casm_toys:small", "casm", options={"checkpoint": str(trained)}, resize=SIDE, crop=SIDE
    )

    def plan(standing, device, workers):
        return resolve(wanted, standing, device, workers)

    ended = conduct(
        Job(plan, partial(Processor, task=Extraction)),
        RunOptions(out=str(tmp_path / "run"), engine="local", device="cpu"),
    )
    assert ended.code == 0
    rows = [row for path in sorted(tmp_path.glob("run/data/*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 24
    assert {(row["status"], row["target"], row["score"]) for row in rows} == {("ok", None, None)}
    assert {(row["map_height"], row["map_width"]) for row in rows} == {(16, 16)}
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert config["options"]["digest"] == checkpoint.open_checkpoint(undisturbed).digest


@pytest.mark.slow
def test_a_moved_or_continued_training_leaves_its_runs_resumable(shards, tmp_path):
    casm, out = tmp_path / "casm", tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(CutError):
            train(request(shards, casm), quiet)

    def run(folder):
        wanted = ExtractRequest(
            [str(shards)], "casm_toys:small", "casm", options={"checkpoint": str(folder)}, resize=SIDE, crop=SIDE
        )
        return conduct(
            Job(lambda *args: resolve(wanted, *args), partial(Processor, task=Extraction)),
            RunOptions(out=str(out), engine="local", device="cpu"),
        ).code

    assert run(casm) == 0
    _, first = load_run_folder(str(out))
    before = files(out / "data")
    for name in ("data/0.parquet", "receipts/0.json"):
        (out / name).unlink()
    train(request(shards, casm, resume=True), quiet)
    assert sorted(path.name for path in (casm / "checkpoints").iterdir()) == ["16", "18", "4"]
    said = StringIO()
    with redirect_stderr(said):
        assert run(casm) == 0
    assert f"the run uses {casm}/checkpoints/4, as it began; {casm}/checkpoints/18 is newer" in said.getvalue()
    for name in ("data/0.parquet", "receipts/0.json"):
        (out / name).unlink()
    casm.rename(tmp_path / "moved")
    assert run(tmp_path / "moved") == 0
    assert files(out / "data") == before
    assert load_run_folder(str(out))[1].fingerprint == first.fingerprint
    shutil.rmtree(tmp_path / "moved/checkpoints/4")
    with pytest.raises(UserError, match=r"is not the checkpoint of this run or does not hold it"):
        run(tmp_path / "moved")
