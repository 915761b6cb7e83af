"""A whole training: its data, its exact resume, bad input, and its masks in an extraction."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import casm_toys
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from casm_toys import SIDE, Small, files, request, small, write_shards
from making import HELPERS, picture, write_tar
from PIL import Image
from torchvision.transforms import v2
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline import methods
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.log import MEASURED, Log
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.pipeline.casm.data.batches import Batches, crop, crop_box
from saltern.pipeline.casm.data.index import make_index
from saltern.pipeline.casm.training import journal, loop
from saltern.pipeline.casm.training.train import train
from saltern.pipeline.engine.conduct import Job, RunOptions, conduct
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.masknet import checkpoint
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("casm") / "shards")


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    """Return the folder of a training without interruption. Tests must not change it."""
    out = tmp_path_factory.mktemp("casm") / "undisturbed"
    train(request(shards, out), quiet)
    return out


def quiet(text: str) -> None:
    """Ignore a line for the user."""


def lines(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]


# --- data


def test_index_finds_the_images_and_labels_of_the_shards(shards):
    found, _ = expand([str(shards)])
    index = make_index(found, 6)
    samples = [sample for shard in found for sample in read_samples(shard)]
    assert index.label_N.tolist() == [sample.label for sample in samples]
    for number, sample in enumerate(samples):
        with open(found[index.shard_N[number]].url, "rb") as tar:
            tar.seek(index.offset_N[number])
            assert tar.read(index.size_N[number]) == sample.image


def test_index_takes_the_classes_in_play_in_their_order(shards):
    found, _ = expand([str(shards)])
    whole, some = make_index(found, 6), make_index(found, 6, [4, 1])
    kept = [[4, 1].index(label) for label in whole.label_N.tolist() if label in (4, 1)]
    assert some.label_N.tolist() == kept
    assert 0 < len(some) < len(whole)


def test_a_batch_follows_from_its_number_in_any_order_and_over_any_ranks(shards):
    index = make_index(expand([str(shards)])[0], 6)
    batches = Batches(index, 5, SIDE, seed=2)  # 24 samples: a batch reaches over from one pass into the next
    row = list(batches.run(0, 12))
    for step in (11, 3, 4):
        alone = batches.read(step)
        assert torch.equal(alone.pixels_BHWC, row[step].pixels_BHWC)
        assert torch.equal(alone.label_B, row[step].label_B)
    batches = replace(batches, batch_size=6)
    parts = [replace(batches, rank=rank, world=2).read(7) for rank in range(2)]
    assert torch.equal(torch.cat([part.pixels_BHWC for part in parts]), batches.read(7).pixels_BHWC)
    labels = torch.cat([batches.read(step).label_B for step in range(8)])
    first, second = labels[:24], labels[24:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(index.label_N.tolist())  # each once a pass
    assert first.tolist() != second.tolist()
    assert not torch.equal(batches.read(0).pixels_BHWC, replace(batches, seed=3).read(0).pixels_BHWC)


def test_a_crop_is_torchvisions():
    """The pixels of one box are equal; areas, ratios and places of many boxes have the same distribution."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 110, 3), dtype=np.uint8))
    flips = 0
    for seed in range(20):
        left, top, width, height = crop_box(110, 70, random.Random(seed))
        found = crop(image, 48, "bilinear", random.Random(seed))
        expected = np.asarray(v2.functional.resized_crop(image, top, left, height, width, [48, 48]))
        mirrored = not np.array_equal(found, expected)
        assert np.array_equal(found[:, ::-1] if mirrored else found, expected)
        flips += mirrored
    assert 4 <= flips <= 16
    theirs, draw = v2.RandomResizedCrop(48), random.Random(1)
    expected = np.array([list(theirs.make_params([image]).values()) for _ in range(4000)], float)  # top left h w
    found = np.array([crop_box(110, 70, draw) for _ in range(4000)], float)[:, [1, 0, 3, 2]]
    np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=1.5)
    np.testing.assert_allclose(found.std(0), expected.std(0), atol=1.5)
    areas = [width * height for _, _, width, height in (crop_box(110, 70, draw, 0.5) for _ in range(500))]
    assert 0.49 * 7700 < min(areas) < 0.53 * 7700
    left, top, width, height = crop_box(500, 10, random.Random(0))  # no crop fits: the centre
    assert (left, top, width, height) == (243, 0, 13, 10)


def test_a_damaged_image_is_passed_over_and_counted(tmp_path):
    samples = [(f"k{i}", {"jpg": b"no image" if i == 2 else picture(i), "cls": str(i)}) for i in range(4)]
    write_tar(tmp_path / "a.tar", samples)
    batch = Batches(make_index(expand([str(tmp_path)])[0], 6), 4, SIDE).read(0)
    assert batch.damaged == 1
    assert sorted(batch.label_B.tolist()) == [0, 1, 3, 3]


# --- an exact resume


class CutError(Exception):
    pass


def interrupt(monkeypatch, step: int, error: type[BaseException] = CutError) -> None:
    real = Training.step

    def cut(self, x, label):
        if self.steps_done == step:
            raise error()
        return real(self, x, label)

    monkeypatch.setattr(Training, "step", cut)


def test_the_training_trains(undisturbed):
    log = lines(undisturbed)
    assert [line["step"] for line in log] == list(range(18))
    assert {line["member"] for line in log} >= {-1, 0, 1, 2}  # the current one, and all of the pool
    assert max(line["right"] for line in log) > 0
    assert min(line["mask_loss"] for line in log) < 0
    names = {name.partition("/")[0] for name in files(undisturbed)}
    assert names == {"checkpoints", "pool", "log.jsonl", "lock-driver", "lock-writer", "curves.png"}
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["16", "18"]
    start, end = small().state_dict(), checkpoint.open_checkpoint(undisturbed).part("classifier")
    assert not torch.equal(start["fc.weight"], end["fc.weight"])


@pytest.mark.parametrize("steps", [(2,), (4, 17), (random.Random(time.time()).randrange(1, 18),)])
def test_an_interrupted_training_ends_as_an_undisturbed_one(steps, shards, undisturbed, tmp_path):
    for number, step in enumerate(steps):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, step)
            with pytest.raises(CutError):
                train(request(shards, tmp_path / "run", resume=number > 0), quiet)
    said: list[str] = []
    train(request(shards, tmp_path / "run", resume=True), said.append)
    assert files(tmp_path / "run") == files(undisturbed), f"interrupted at {steps}"
    if steps[-1] >= 4:
        assert any(f"resumes at step {steps[-1] // 4 * 4}" in text for text in said)
    train(request(shards, tmp_path / "run", resume=True), quiet)  # nothing is left to do
    assert files(tmp_path / "run") == files(undisturbed)


def test_an_encoder_of_its_own_and_a_pool_in_16_bits_are_gone_on_with_too(shards, tmp_path):
    how = Hyperparameters(
        thinning=casm_toys.OFTEN, lam=2.0, pool_size=3, share_encoder=False, pool_half=True, precision="bf16"
    )
    train(request(shards, tmp_path / "whole", hyperparameters=how, classes=[5, 1, 0]), quiet)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 11)
        with pytest.raises(CutError):
            train(request(shards, tmp_path / "cut", hyperparameters=how, classes=[5, 1, 0]), quiet)
    train(request(shards, tmp_path / "cut", hyperparameters=how, classes=[5, 1, 0], resume=True), quiet)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_checkpoint_that_was_being_written_or_was_damaged_does_not_count(shards, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_clear", lambda self: (_ for _ in ()).throw(CutError))
        with pytest.raises(CutError):
            train(request(shards, tmp_path / "run"), quiet)
    with monkeypatch.context() as patch:
        interrupt(patch, 9)
        with pytest.raises(CutError):
            train(request(shards, tmp_path / "run", resume=True), quiet)
    tensors = tmp_path / "run/checkpoints/8/tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    (tmp_path / "run/checkpoints/.unfinished-12").mkdir()
    (tmp_path / "run/pool/.unfinished-9.safetensors").write_bytes(b"half")
    said: list[str] = []
    train(request(shards, tmp_path / "run", resume=True), said.append)
    assert "damaged" in said[0]
    assert "step 4" in " ".join(said)
    assert files(tmp_path / "run") == files(undisturbed)


def test_a_killed_process_is_gone_on_from(shards, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, HELPERS / "casm_toys.py", shards, tmp_path / "killed", "20"]
    process = subprocess.Popen([*map(str, line)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/checkpoints/20").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.Random(time.time()).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train(request(shards, tmp_path / "killed", epochs=20, resume=True), quiet)
    train(request(shards, tmp_path / "whole", epochs=20), quiet)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


class Scheduler:
    """A scheduler that ends the job by SIGTERM, in place of an exception."""

    def __new__(cls):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("SIGTERM was not answered")


@pytest.mark.parametrize("how", [KeyboardInterrupt, Scheduler], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_names_the_checkpoint(how, shards, tmp_path, monkeypatch):
    interrupt(monkeypatch, 6, how)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(request(shards, tmp_path), said.append)
    assert "the checkpoint of step 4 is complete: the same command with --resume" in said[-1]


def test_a_checkpoint_costs_one_classifier(undisturbed):
    """A checkpoint holds the classifier and its momentum, of the same size. The pool has 3 more classifiers."""
    weights = sum(value.numel() * value.element_size() for value in Small().state_dict().values())
    found = checkpoint.open_checkpoint(undisturbed)
    taken = sum(t.numel() * t.element_size() for part in ("classifier", "sgd") for t in tensors_in(found.part(part)))
    assert weights < taken <= 2 * weights
    named = [
        checkpoint.open_checkpoint(folder).part("pool_manifest") for folder in sorted(found.folder.parent.iterdir())
    ]
    assert [len(manifest) for manifest in named] == [3, 3]
    steps = {f"{entry['step']}.safetensors" for manifest in named for entry in manifest}
    assert steps == {path.name for path in (undisturbed / "pool").iterdir()}  # no unnamed files are left


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


# --- requests that are refused before any work


def refused(wanted, match: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", lambda *args: pytest.fail("work was started"))
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
        ("-1", None, "'k1' is of class -1, out of range"),
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


def test_the_pools_memory_is_stated_and_refused_where_it_does_not_fit(shards, tmp_path, monkeypatch):
    said: list[str] = []
    train(request(shards, tmp_path / "fits", epochs=1), said.append)
    assert any("the pool takes up to 0.00 GB of memory (3 classifiers)" in text for text in said)
    monkeypatch.setattr(loop, "available_memory", lambda: 20_000)
    refused(request(shards, tmp_path / "run"), r"lower --pool-size \(to \d at most\).*--pool-half")
    alone = Hyperparameters(thinning=THINNINGS["L"])
    train(request(shards, tmp_path / "none", epochs=1, steps_per_epoch=1, hyperparameters=alone), quiet)


def test_a_loss_that_is_not_finite_ends_the_training(shards, tmp_path):
    wild = Hyperparameters(thinning=THINNINGS["L"], lr_classifier=1e30)
    with pytest.raises(UserError, match="a loss is not finite"):
        train(request(shards, tmp_path, hyperparameters=wild), quiet)


def test_a_collapse_of_the_masks_is_said_once_in_words(tmp_path):
    said: list[str] = []
    place = MEASURED.index("mask_mean")
    areas = [0.9, 0.99] * 30 + [0.995] * 60 + [0.5] * 10 + [0.01] * 60
    with journal.Journal(tmp_path, 0, 300, 4, said.append) as watched:
        for step, area in enumerate(areas):
            measured = torch.zeros(len(MEASURED), dtype=torch.float64)
            measured[place] = area
            watched.add(Log(step, -1, measured, torch.tensor(2.0, dtype=torch.float64), 0.0), torch.tensor(0.0))
        watched.flush()
    above, below = said
    assert "the mean mask is 0.98" in above
    assert "take out everything. lambda may be too low: raise --lambda" in above
    assert "take out nothing. lambda may be too high: lower --lambda" in below
    assert [line["mask_mean"] for line in lines(tmp_path)] == areas


# --- the method


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
    with pytest.raises(UserError, match="is not the requested checkpoint"):
        methods.build("casm", small(), checkpoint=str(undisturbed), digest="0" * 64)


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
    wanted = ExtractRequest(
        [str(shards)], "casm_toys:small", "casm", options={"checkpoint": str(undisturbed)}, resize=SIDE, crop=SIDE
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


def test_the_command_trains_and_extract_takes_its_folder(shards, tmp_path):
    (tmp_path / "classes.txt").write_text("4\n1, 0\n")
    line = f"train-casm {shards} --out {tmp_path}/casm --model casm_toys:small --side 64 --epochs 1 --batch-size 4"
    call = [*line.split(), "--classes", f"{tmp_path}/classes.txt", "--device", "cpu", "--steps-per-epoch", "3"]
    ended = CliRunner().invoke(app, call)
    assert ended.exit_code == 0, ended.output
    assert f"{tmp_path}/casm/checkpoints/3 is done" in ended.stdout
    config = checkpoint.open_checkpoint(tmp_path / "casm").config
    assert config["classes"] == [4, 1, 0]
    assert (config["settings"]["thinning"], config["settings"]["lam"]) == ("L100", "auto")
    for wrong, match in (
        (["--resume", "--thinning", "L99"], "'L99' is not one of 'F', 'L'"),
        (["--resume", "--lambda", "much"], "--lambda 'much' is not a number or auto"),
        (["--resume", "--classes", "1,x"], "is not a list of numbers"),
        (["--resume", "--seed", "4"], "seed: 0 there, 4 requested"),
    ):
        ended = CliRunner().invoke(app, [*call, *wrong])
        assert match in f"{ended.exception} {ended.output}"
    line = f"extract {shards} --out {tmp_path}/run --model casm_toys:small --resize 64 --crop 64 --method casm"
    ended = CliRunner().invoke(app, [*line.split(), "--checkpoint", f"{tmp_path}/casm", "--device", "cpu"])
    assert ended.exit_code == 0, ended.output
    assert set(pq.read_table(tmp_path / "run/data/0.parquet").to_pydict()["predicted"]) <= {0, 1, 4}


def test_a_config_file_says_the_same(shards, tmp_path):
    (tmp_path / "c.toml").write_text(
        'model = "casm_toys:small"\nside = 64\nepochs = 1\nsteps-per-epoch = 2\nbatch-size = 4\ntv = 0.5\n'
        'classes = [4, 1]\nmin-crop = 0.5\nlambda = "3"\ndevice = "cpu"\n'
    )
    call = ["train-casm", str(shards), "--out", f"{tmp_path}/casm", "--config", f"{tmp_path}/c.toml"]
    ended = CliRunner().invoke(app, call)
    assert ended.exit_code == 0, ended.output
    config = checkpoint.open_checkpoint(tmp_path / "casm").config
    assert (config["settings"]["tv"], config["settings"]["lam"], config["min_crop"]) == (0.5, 3.0, 0.5)
    assert (config["classes"], config["batch_size"], config["steps"]) == ([4, 1], 4, 2)
    (tmp_path / "c.toml").write_text("options = {a = 1}")
    assert "unknown key 'options'" in str(CliRunner().invoke(app, call).exception)
