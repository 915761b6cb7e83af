"""Requests that a training refuses before any work, and losses that end it."""

from dataclasses import replace

import casm_toys
import pytest
from casm_toys import CutError, files, interrupt, quiet, request
from making import picture, write_tar

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.pipeline.casm.training import trainee
from saltern.pipeline.casm.training.train import train
from saltern.pipeline.training.batches import Batches
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")


def refused(wanted, match: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "run", lambda *args: pytest.fail("work was started"))
        with pytest.raises(UserError, match=match):
            train(wanted, quiet)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"classes": [1, 17]}, r"class 17 is out of range: the model has classes 0\.\.5"),
        ({"classes": [1, 1]}, "each given once"),
        ({"epochs": 0}, "--epochs 0: it must be 1 or more"),
        ({"model": "casm_toys:nothing"}, "casm_toys"),
    ],
)
def test_wrong_calls_are_refused(changed, match, shards, tmp_path):
    refused(replace(request(shards, tmp_path / "run"), **changed), match)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "classes", "match"),
    [
        ("6", None, r"'k1' is of class 6, out of range: the model has classes 0\.\.5"),
        ("-1", None, "'k1' has no class; training needs a number from 0"),
        ("cat", None, "'k1' has no class"),
        ("2", [2, 3, 5], "no sample in the shards is of class 3, 5"),
        ("2", [4], "no image of the classes"),
    ],
)
def test_labels_and_classes_are_checked_against_each_other(content, classes, match, tmp_path):
    write_tar(
        tmp_path / "in/a.tar", [("k0", {"jpg": picture(0), "cls": "1"}), ("k1", {"jpg": picture(1), "cls": content})]
    )
    refused(request(tmp_path / "in", tmp_path / "run", classes=classes), match)


def test_a_broken_shard_is_refused(tmp_path):
    path = write_tar(tmp_path / "in/a.tar", [("k0", {"jpg": picture(0), "cls": "1"})])
    path.write_bytes(path.read_bytes()[:700])
    refused(request(tmp_path / "in", tmp_path / "run"), "a shard is broken: .*cut")


def test_another_training_in_the_folder_is_refused(shards, undisturbed):
    before = files(undisturbed)
    refused(request(shards, undisturbed), "--resume continues it, or give another --out")
    refused(request(shards, undisturbed, resume=True, batch_size=5), "batch_size: 4 there, 5 requested")
    refused(request(shards, undisturbed, resume=True, epochs=4), "steps: 18 there, 24 requested")
    changed = Hyperparameters(thinning=casm_toys.OFTEN, pool_size=3, seed=6)
    refused(request(shards, undisturbed, resume=True, hyperparameters=changed), "seed: 5 there, 6 requested")
    refused(replace(request(shards, undisturbed, resume=True), model="casm_toys:other"), "model: .*other")
    assert files(undisturbed) == before


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gone", "altered", "cut"])
def test_a_pool_file_that_is_gone_or_altered_is_named(what, shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(CutError):
            train(request(shards, tmp_path), quiet)
    file = sorted((tmp_path / "pool").glob("*"))[1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.unlink()
    if what != "gone":
        file.write_bytes(content if what == "altered" else content[:100])
    refused(request(shards, tmp_path, resume=True), rf"the pool file .*{file.name} is ")


@pytest.mark.slow
def test_the_pools_memory_is_stated_and_refused_where_it_does_not_fit(shards, tmp_path, monkeypatch):
    said: list[str] = []
    train(request(shards, tmp_path / "fits", epochs=1), said.append)
    assert any("the pool takes up to 0.00 GB of memory (3 classifiers)" in text for text in said)
    monkeypatch.setattr(trainee, "available_memory", lambda: 20_000)
    refused(request(shards, tmp_path / "run"), r"lower --pool-size \(to \d at most\).*--pool-half")
    alone = Hyperparameters(thinning=THINNINGS["L"])
    train(request(shards, tmp_path / "none", epochs=1, steps_per_epoch=1, hyperparameters=alone), quiet)


def test_a_loss_that_is_not_finite_ends_the_training(shards, tmp_path):
    wild = Hyperparameters(thinning=THINNINGS["L"], lr_classifier=1e30)
    with pytest.raises(UserError, match="a loss is not finite"):
        train(request(shards, tmp_path, hyperparameters=wild), quiet)
