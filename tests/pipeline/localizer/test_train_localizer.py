"""A whole training of a localizer: resumed to the bit, loaded by hand, used as a method, refused in one line."""

import json
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from casm_toys import SIDE, calm, files, log_lines, quiet, small
from commands import call, refused
from judging import judge
from localizer_toys import CutError, extract, interrupt, request, write_shards
from naive_metrics import naive_iou
from safetensors.torch import load_file

from saltern.pipeline import methods
from saltern.pipeline.localizer.hyperparameters import Hyperparameters
from saltern.pipeline.localizer.plan import make_plan
from saltern.pipeline.localizer.train import train
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.training.loop import preprocess_of
from saltern.pipeline.training.loop import run as run_loop
from saltern.pipeline.training.ranks import Ranks
from saltern.schemas.errors import UserError

TUNED = Hyperparameters(seed=3, trunk="tuned", labels="maps")


@pytest.mark.slow
def test_the_training_trains_and_writes_no_pickle(undisturbed):
    log = log_lines(undisturbed)
    assert [line["step"] for line in log] == list(range(9))
    assert log[-1]["loss"] < log[0]["loss"]
    suffixes = {path.suffix for path in undisturbed.rglob("*") if path.is_file() and path.stat().st_size}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".bin"}  # .bin: plain records of the labels


def test_the_config_has_the_preprocessing_of_the_run(run, tmp_path):
    plan = make_plan(request(run, tmp_path / "new"), "cpu", None, quiet)
    assert preprocess_of(plan.config) == open_run(str(run)).config.preprocess


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 7])
def test_an_interrupted_training_ends_as_an_undisturbed_one(step, run, val, undisturbed, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(CutError):
            train(request(run, tmp_path / "run", val=str(val)), quiet)
    train(request(run, tmp_path / "run", val=str(val), resume=True), quiet)
    assert files(tmp_path / "run") == files(undisturbed)


@pytest.mark.slow
def test_a_tuned_trunk_is_resumed_too_and_moves(run, tmp_path):
    for name, cut in (("whole", None), ("cut", 6)):
        with pytest.MonkeyPatch.context() as patch:
            if cut is not None:
                interrupt(patch, cut)
                with pytest.raises(CutError):
                    train(request(run, tmp_path / name, hyperparameters=TUNED), quiet)
        train(request(run, tmp_path / name, hyperparameters=TUNED, resume=cut is not None), quiet)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole/localizer.safetensors")
    moved = {key for key, value in calm().state_dict().items() if not torch.equal(value, tensors[f"trunk/{key}"])}
    assert "stem.0.weight" in moved
    assert "fc.weight" not in moved  # the taps do not depend on it


def test_the_ten_lines_of_the_docs_load_the_files_and_give_the_method_s_maps(undisturbed, tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs/localizer.md").read_text()
    lines = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1]
    assert len([line for line in lines.splitlines() if line]) == 10
    (tmp_path / "localizer").symlink_to(undisturbed)
    monkeypatch.chdir(tmp_path)
    x_BCHW = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    named = {"x_BCHW": x_BCHW}
    with torch.no_grad():
        exec(lines, named)  # noqa: S102 - lines of our own page
    map_Bhw, logits_BK = named["map_Bhw"], named["logits_BK"]
    with methods.build("localizer", calm(), checkpoint=str(undisturbed)) as method:
        torch.testing.assert_close(method(x_BCHW), map_Bhw, rtol=0, atol=0)
        torch.testing.assert_close(method.last.logits_BK, logits_BK, rtol=0, atol=0)
        assert method.last.target_B is None
    assert map_Bhw.shape == (3, SIDE // 4, SIDE // 4)
    assert 0 <= map_Bhw.min() <= map_Bhw.max() <= 1


def naive_le(run_folder: str) -> float:
    """Return the percentage of the run's samples whose box has no IoU of more than 0.5 with the true one."""
    run = open_run(run_folder)
    (shard,) = run.shards
    missed = []
    for sample, rows in run.joined(shard):
        x0, y0, x1, y1 = json.loads(sample.members["json"])["boxes"][0]
        missed.append(naive_iou(tuple(rows[0].boxes[0]), (x0, y0, x1 + 1, y1 + 1)) <= 0.5)
    return 100 * sum(missed) / len(missed)


@pytest.mark.slow
def test_extract_finds_what_the_validation_measured(undisturbed, val, tmp_path):
    (tar,) = (shard["url"] for shard in json.loads((val / "run.json").read_text())["shards"])
    out = extract(tar, tmp_path / "found", method="localizer", layer=None, options={"checkpoint": str(undisturbed)})
    figures = json.loads((undisturbed / "localizer.json").read_text())["validation"]
    assert list(figures) == ["localizer", "its teacher, grad-cam mean:1", "random", "centre-box", "whole-image"]
    assert figures["localizer"]["om"] == 100  # the labels are 1, and the network says 0
    assert (figures["random"]["max_box_acc"], figures["random"]["max_box_acc_v2"]) == (None, None)
    assert figures["localizer"]["le"] == pytest.approx(naive_le(str(out)))
    assert figures["its teacher, grad-cam mean:1"]["le"] == pytest.approx(naive_le(str(val)))
    measured = [*judged(out, "found"), *judged(val, "random", "centre-box", "whole-image", "found")]
    names = ("localizer", "random", "centre-box", "whole-image", "its teacher, grad-cam mean:1")
    for name, values in zip(names, measured, strict=True):
        known = {metric: value for metric, value in figures[name].items() if value is not None}
        assert len(known) == (3 if name == "random" else 5)
        assert known == pytest.approx({metric: values[metric] for metric in known})
    whole = [1 - (x1 + 1 - x0) * (y1 + 1 - y0) / (w * h) for x0, y0, x1, y1, w, h in true_boxes(tar)]
    assert figures["whole-image"]["le"] == pytest.approx(100 * sum(share >= 0.5 for share in whole) / len(whole))
    assert json.loads((out / "run.json").read_text())["config"]["discretize"] == "fixed:0.5"


def judged(run_folder: Path, *subjects: str) -> list[dict[str, float]]:
    """Return LE, OM, F1 and the box accuracies of an evaluation of the run, in percent."""
    copy = shutil.copytree(run_folder, run_folder.parent / "judged")
    found = judge(copy, metrics=("le", "om", "f1", "max-box"))
    by_subject = {"found": found.runs[0].estimates, **found.controls}
    names = ("le", "om", "f1", "max_box_acc", "max_box_acc_v2")
    return [{name: 100 * by_subject[subject][name].value for name in names} for subject in subjects]


def true_boxes(tar: str) -> list[list[int]]:
    """Return the inclusive true box, width and height of each sample."""
    with tarfile.open(tar) as file:
        found = [json.load(file.extractfile(member)) for member in file if member.name.endswith(".json")]
    return [[*content["boxes"][0], content["width"], content["height"]] for content in found]


def as_rank(ranks: Ranks, plan) -> None:
    run_loop(plan, ranks, print)


@pytest.mark.slow
def test_worlds_of_1_and_2_have_the_same_losses(run, val, undisturbed, tmp_path, in_ranks):
    plan = make_plan(request(run, tmp_path / "two", val=str(val), workers=2), "cpu", None, quiet)
    assert in_ranks(as_rank, plan) == [None, None]
    for one, two in zip(log_lines(undisturbed), log_lines(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
    figures = [
        json.loads((folder / "localizer.json").read_text())["validation"] for folder in (undisturbed, tmp_path / "two")
    ]
    assert figures[0]["localizer"] == pytest.approx(figures[1]["localizer"], abs=0.1)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"weights": "none"}, "--weights none without --model"),
        ({"min_crop": 0.0}, "--min-crop 0.0: it is a share"),
        ({"batch_size": 5, "workers": 2}, "2 cannot share it equally"),
        ({"model": "making:tiny"}, "has no stages at strides 4, 8, 16 and 32"),
    ],
)
def test_wrong_calls_are_refused(changed, match, run, tmp_path):
    with pytest.raises(UserError, match=match):
        make_plan(request(run, tmp_path / "out", **changed), "cpu", None, quiet)
    assert not (tmp_path / "out").exists()


def test_a_validation_that_tells_nothing_is_refused(run, val, tmp_path):
    with pytest.raises(UserError, match="which is trained on; give a run of other shards"):
        train(request(run, tmp_path / "out", val=str(run)), quiet)
    other = extract(write_shards(tmp_path / "in", 1, 2), tmp_path / "otsu", discretize="otsu")
    with pytest.raises(UserError, match=r"has discretize otsu, and .* has mean:1: give a run"):
        train(request(run, tmp_path / "out", val=str(other)), quiet)


def test_other_labels_and_other_settings_cannot_continue_a_training(run, undisturbed, val, tmp_path):
    before = files(undisturbed)
    usual = request(run, undisturbed, val=str(val), resume=True)
    with pytest.raises(UserError, match="batch_size: 4 there, 8 requested"):
        train(replace(usual, batch_size=8), quiet)
    with pytest.raises(UserError, match="labels_digest"):
        train(replace(usual, run=str(val), val=None), quiet)
    assert files(undisturbed) == before


def test_wrong_localizers_are_refused(undisturbed, tmp_path):
    with pytest.raises(UserError, match="of `saltern train-localizer`"):
        methods.build("localizer", calm())
    with pytest.raises(UserError, match="holds no localizer"):
        methods.build("localizer", calm(), checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="is not the localizer of this run"):
        methods.build("localizer", calm(), checkpoint=str(undisturbed), digest="0" * 64)
    moved = small()
    with torch.no_grad():
        moved.stem[0].weight.add_(0.1)
    with pytest.raises(UserError, match="was trained on other weights of the frozen trunk"):
        methods.build("localizer", moved, checkpoint=str(undisturbed))
    for name in ("localizer.json", "localizer.safetensors"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    content = bytearray((tmp_path / "localizer.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "localizer.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"is not the file that localizer.json names"):
        methods.build("localizer", calm(), checkpoint=str(tmp_path))


@pytest.mark.slow
def test_the_command_trains(run, tmp_path):
    words = ["train-localizer", run, "--out", tmp_path / "out", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    ended = call(*words, "--labels", "boxes")
    assert ended.returncode == 0, ended.stderr
    assert "next: saltern extract ... --method localizer --checkpoint" in ended.stdout
    assert "--resume continues it" in refused(call(*words))
    assert "'mask' is not one of" in call(*words, "--labels", "mask").stderr
