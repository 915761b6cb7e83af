"""A training whose masks collapse goes back to the last healthy checkpoint, twice; then it ends."""

import casm_toys
import pytest
import torch
from casm_toys import CutError, files, log_lines, quiet, request
from commands import call

from saltern.pipeline.casm.algorithm import collapse
from saltern.pipeline.casm.algorithm.collapse import Collapse, Watch
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.training.train import train
from saltern.pipeline.masknet import checkpoint
from saltern.schemas.errors import CollapseError

pytestmark = pytest.mark.usefixtures("undrawn")
FIXED = Hyperparameters(thinning=casm_toys.OFTEN, lam=3.0, pool_size=3, lr_classifier=0.01, seed=5)


@pytest.fixture
def soon(monkeypatch):
    """Let 5 dead steps be a collapse, read after each step."""
    monkeypatch.setattr(collapse, "DEAD", 5)
    monkeypatch.setattr(collapse, "_EVERY", 1)


def force(patch, step, bias, times=1, cut=None):
    """Set the last bias at a step of the first `times` passes; raise CutError at step `cut` of the following pass."""
    real, passes = Training.step, []

    def forced(self, x_BCHW, label_B):
        if len(x_BCHW) != 4:  # the trial before the training
            return real(self, x_BCHW, label_B)
        if self.steps_done == step and self.setbacks < times:
            with torch.no_grad():
                self.decoder.last.weight.zero_()
                self.decoder.last.bias.fill_(bias)
        passes.append((self.setbacks, self.steps_done))
        if cut is not None and self.setbacks == 1 and self.steps_done == cut:
            raise CutError
        return real(self, x_BCHW, label_B)

    patch.setattr(Training, "step", forced)
    return passes


def feed(watch, areas):
    for step, area in enumerate(areas):
        watch.add(step, torch.tensor(area))
    watch.read(len(areas) - 1)


def test_only_dead_steps_in_a_row_are_a_collapse():
    watch = Watch()
    feed(watch, [0.5] * 10 + [0.01] * 99 + [0.03] + [0.99] * 50)
    assert not watch.healthy
    feed(watch, [0.97])
    assert watch.healthy
    with pytest.raises(Collapse) as raised:
        feed(watch, [0.5] + [0.0] * 60 + [1.0] * 40)
    assert (raised.value.step, raised.value.what) == (100, "everything")


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "what"), [(-12.0, "nothing"), (12.0, "everything")])
@pytest.mark.usefixtures("soon")
def test_one_collapse_is_repeated_with_a_smaller_step(shards, tmp_path, monkeypatch, bias, what):
    said: list[str] = []
    passes = force(monkeypatch, 9, bias)
    train(request(shards, tmp_path / "run", hyperparameters=FIXED), said.append)
    assert passes == [(0, step) for step in range(14)] + [(1, step) for step in range(8, 18)]
    assert [line["step"] for line in log_lines(tmp_path / "run")] == list(range(18))
    assert all(0.02 < line["mask_mean"] < 0.98 for line in log_lines(tmp_path / "run"))
    (warning,) = [text for text in said if "collapsed" in text]
    assert f"taken out {what} for 100 steps, up to step 13; back to the last healthy checkpoint" in warning
    rates = checkpoint.open_checkpoint(tmp_path / "run").part("adam")["param_groups"][0]["lr"]
    assert rates == pytest.approx(0.001 * 0.5 * 0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("cut", [8, 13])
def test_a_stop_after_a_collapse_changes_nothing(shards, tmp_path, monkeypatch, cut):
    with monkeypatch.context() as patch:
        force(patch, 9, -12.0)
        train(request(shards, tmp_path / "whole", hyperparameters=FIXED), quiet)
    with monkeypatch.context() as patch:
        force(patch, 9, -12.0, cut=cut)
        with pytest.raises(CutError):
            train(request(shards, tmp_path / "cut", hyperparameters=FIXED), quiet)
    force(monkeypatch, 9, -12.0)
    train(request(shards, tmp_path / "cut", hyperparameters=FIXED, resume=True), quiet)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("soon")
def test_the_third_collapse_ends_the_training(shards, tmp_path, monkeypatch):
    said: list[str] = []
    passes = force(monkeypatch, 6, -12.0, times=9)
    with pytest.raises(CollapseError, match=r"again after 2 repetitions.*; lower --lambda \(3\), or use --lambda auto"):
        train(request(shards, tmp_path / "run", hyperparameters=FIXED), said.append)
    assert [step for setbacks, step in passes if setbacks == 2] == list(range(4, 11))
    assert len([text for text in said if "collapsed" in text]) == 2
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["4"]  # no dead checkpoint is kept
    words = f"train-casm {shards} --out {tmp_path}/cli --model casm_toys:small --side 64 --epochs 5 --device cpu"
    ended = call(*words.split(), *["--steps-per-epoch", "4", "--batch-size", "4", "--preset", "published"])
    assert ended.returncode == 1
    assert "lower --lambda (10), or use --lambda auto with --preset steady" in ended.stderr
