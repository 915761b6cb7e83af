"""Test validation during training: its numbers against `extract` and `evaluate`, over ranks, on bad data; its page."""

import json
import re
import threading
from collections import Counter
from contextlib import closing
from functools import partial
from itertools import cycle
from pathlib import Path

import casm_toys
import numpy as np
import pytest
import torch
from judging import found_of
from making import picture, write_tar

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.pipeline.casm.training.train import train
from saltern.pipeline.casm.watch import curves
from saltern.pipeline.casm.watch.mask_page import SHOWN
from saltern.pipeline.casm.watch.validation import Validation
from saltern.pipeline.engine.conduct import Job, RunOptions, conduct
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.masknet.checkpoint import Checkpoints
from saltern.pipeline.masknet.head import restrict
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.shards.expand import expand
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
SIDE = casm_toys.SIDE
HOW = {"class_numbers": range(6), "batch_size": 4, "threads": 2}
SIZES = ((72, 100), (90, 64), (64, 64))


def boxes(number: int, height: int, width: int) -> str:
    x0, y0 = number % 7 * 5, number % 5 * 6
    found = [[x0, y0, min(x0 + 40, width) - 1, min(y0 + 45, height) - 1]]
    return json.dumps({"boxes": found[:1] * (1 + number % 2), "height": height, "width": width, "name": f"<{number}>"})


def write_val(folder: Path, count: int = 10, **changed: dict[str, bytes | str]) -> Path:
    """Write two shards of `count` samples; `changed` replaces members by key: k3={"json": "{}"}."""
    for shard in range(2):
        samples = []
        for number, (height, width) in zip(range(shard * count, (shard + 1) * count), cycle(SIZES), strict=False):
            size = height, width
            usual = {"jpg": picture(number, *size), "cls": str(number % 6), "json": boxes(number, *size)}
            samples.append((f"k{number}", usual | changed.get(f"k{number}", {})))
        write_tar(folder / f"val-{shard}.tar", samples)
    return folder


ODD = {
    "k2": {"jpg": b"no image"},
    "k5": {"json": "{}"},
    "k7": {"json": '{"boxes": [[1, 2, 3]]}'},
    "k8": {"cls": "17"},
    "k9": {"json": '{"boxes": [[900, 900, 910, 910]]}'},  # outside of the image
    "k11": {"cls": "none"},
}


def made(classes=None, dropout: float = 0.0, **changed) -> Training:
    net = casm_toys.small()
    net.dropout.p = dropout
    if classes is not None:
        restrict(net, classes)
    training = Training(net, Hyperparameters(**{"thinning": THINNINGS["L"], "lam": "auto", "steps": 9, **changed}))
    step(training, 3)
    return training


def step(training: Training, count: int) -> list[dict[str, float]]:
    draw = torch.Generator().manual_seed(training.steps_done)
    logs = []
    for _ in range(count):
        x_BCHW = torch.randn(4, 3, SIDE, SIDE, generator=draw)
        logs.append(training.step(x_BCHW, training.predict(x_BCHW)[0].argmax(1)).floats())
    return logs


def validation(val: Path, root: Path, resize: int = SIDE, **changed) -> Validation:
    return Validation(expand([str(val)])[0], root, Preprocess(resize, SIDE), **{**HOW, **changed})


def lines(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "validation.jsonl").read_text().splitlines()]


def extracted(training: Training, classes, val: Path, folder: Path, resize: int) -> str:
    """Run `saltern extract --method casm` on a checkpoint of the training, and return its folder."""
    config = {"model": "casm_toys:small", "classes": classes, "model_classes": 6}
    Checkpoints(folder).save(training.state_dict(pool=False), config, training.pool.members)
    options = {"checkpoint": str(folder)}
    wanted = ExtractRequest(
        [str(val)], "casm_toys:small", "casm", options=options, resize=resize, crop=SIDE, batch_size=4
    )

    def plan(standing, device, workers):
        return resolve(wanted, standing, device, workers)

    conduct(
        Job(plan, partial(Processor, task=Extraction)),
        RunOptions(out=str(folder / "run"), engine="local", device="cpu"),
    )
    return str(folder / "run")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("classes", "resize", "changed"),
    [(None, SIDE, {}), ([1, 4, 2], 80, {}), (None, SIDE, {"share_encoder": False})],
)
def test_numbers_are_those_of_extract_and_evaluate(classes, resize, changed, tmp_path):
    training, val = made(classes, **changed), write_val(tmp_path / "val", **ODD)
    found = validation(val, tmp_path / "casm", resize, class_numbers=classes or range(6))(training)
    run = extracted(training, classes, val, tmp_path / "kept", resize)
    estimates = found_of(Path(run))
    for name in ("le", "f1"):
        assert found[name] == pytest.approx(100 * estimates[name].value, abs=1e-6)
    assert 0 < found["f1"] < 100
    rows = list(open_run(run))
    right = [row.predicted == row.label for row in rows if row.label in (classes or range(6))]
    assert found["top1"] == pytest.approx(100 * sum(right) / len(right))
    areas = torch.tensor([row.map().mean() for row in rows if row.map_bytes is not None], dtype=torch.double)
    assert found["mask_mean"] == pytest.approx(float(areas.mean()))
    assert found["mask_std"] == pytest.approx(float(areas.std(correction=0)), rel=1e-4)
    counts = {"samples": 20, "with_boxes": estimates["le"].count, "in_play": len(right), "damaged": 1}
    assert {name: found[name] for name in counts} == counts
    assert (counts["with_boxes"], found["step"]) == (17, 3)
    assert lines(tmp_path / "casm") == [found]


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_image_is_a_miss(tmp_path):
    """The other sample counts as in a shard where only it is judged."""
    training = made()
    whole = validation(write_val(tmp_path / "whole", 1), tmp_path / "a")(training)
    hurt = validation(write_val(tmp_path / "hurt", 1, k1={"jpg": b"\xff\xd8\xff"}), tmp_path / "b")(training)
    alone = validation(write_val(tmp_path / "alone", 1, k1={"json": "{}", "cls": "9"}), tmp_path / "c")(training)
    assert (whole["damaged"], hurt["damaged"], hurt["samples"], hurt["with_boxes"]) == (0, 1, 2, 2)
    assert (hurt["f1"], hurt["top1"]) == (alone["f1"] / 2, alone["top1"] / 2)
    assert hurt["le"] == 50 + alone["le"] / 2
    assert alone["in_play"] == 1


@pytest.mark.usefixtures("undrawn")
def test_ranks_give_the_numbers_of_one(tmp_path):
    val = write_val(tmp_path / "val", **ODD)
    alone = validation(val, tmp_path / "alone", batch_size=1)(made())
    barrier, given, found = threading.Barrier(2), [[], []], [{}, {}]
    root = tmp_path / "both"

    def rank(number: int) -> None:
        def average(tensors):
            given[number] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            for tensor, one, other in zip(tensors, *given, strict=True):
                tensor.copy_((one + other) / 2)
            barrier.wait()

        torch.set_num_threads(1)
        mine = validation(val, root, batch_size=1, rank=number, world=2, average=average, say=said[number].append)
        mine.cut(0)
        found[number] = mine(trainings[number])

    trainings, said = [made(), made()], [[], []]
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == pytest.approx(alone, abs=1e-9)
    assert lines(root) == [found[0]]
    assert (len(said[0]), len(said[1])) == (1, 0)
    assert "LE" in said[0][0]
    assert "1 of them damaged" in said[0][0]
    # Both pages show the same samples.
    pages = [(folder / "masks/3.html").read_text() for folder in (root, tmp_path / "alone")]
    assert re.findall("<h2>.*?</h2>", pages[0]) == re.findall("<h2>.*?</h2>", pages[1])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("changed", [{}, {"share_encoder": False, "batch_norm": "eval"}, {"thinning": THINNINGS["F"]}])
def test_a_training_goes_on_as_if_it_had_not_been_measured(changed, tmp_path):
    plain, watched = made(dropout=0.3, **changed), made(dropout=0.3, **changed)
    measure = validation(write_val(tmp_path / "val", 3), tmp_path)
    states = torch.random.get_rng_state()
    first = measure(watched)
    assert torch.equal(torch.random.get_rng_state(), states)
    assert {**measure(watched)} == first
    assert step(plain, 3) == step(watched, 3)
    torch.testing.assert_close(plain.state_dict(), watched.state_dict(), rtol=0, atol=0)
    flags = [[weight.requires_grad for weight in part.classifier.parameters()] for part in (plain, watched)]
    assert flags[0] == flags[1]


@pytest.mark.usefixtures("undrawn")
def test_a_resume_drops_what_is_later(tmp_path):
    training, val = made(), write_val(tmp_path / "val", 3)
    measure = validation(val, tmp_path)
    for _ in range(3):
        measure(training)
        measure(training)  # the same step again: one line
        step(training, 2)
    files = {path: path.read_bytes() for path in (tmp_path / "validation.jsonl", *tmp_path.glob("masks/*"))}
    assert [line["step"] for line in lines(tmp_path)] == [3, 5, 7]
    with (tmp_path / "validation.jsonl").open("a") as log:
        log.write('{"step": 9, "le"')  # of a run that was killed
    validation(val, tmp_path, rank=1, world=2).cut(0)  # only rank 0 cuts
    validation(val, tmp_path).cut(7)
    assert {path: path.read_bytes() for path in files} == files
    (tmp_path / "masks/000123.png").write_bytes(b"of the user")
    validation(val, tmp_path).cut(5)
    assert [line["step"] for line in lines(tmp_path)] == [3, 5]
    assert {path.name for path in tmp_path.glob("masks/*")} == {
        *("3.html", "3.npz", "5.html", "5.npz", "epochs.html"), "000123.png"
    }  # fmt: skip
    validation(val, tmp_path / "new").cut(0)  # without files
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def measured(shards, tmp_path_factory) -> tuple[list[str], dict[str, str]]:
    """Return shards to validate on, and the files of an undisturbed training that does."""
    folder = tmp_path_factory.mktemp("measured")
    val = [str(write_val(folder / "val", 4))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw", lambda root: None)
        train(casm_toys.request(shards, folder / "whole", val=val), print)
    return val, casm_toys.files(folder / "whole")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("step", [5, 9, 12])
def test_a_resumed_training_is_measured_as_an_undisturbed_one(step, shards, measured, tmp_path, monkeypatch):
    """Stop before, at and after a checkpoint. Epochs end at 6, 12, 18; checkpoints are at 4, 8, 12, 16, 18."""
    val, whole = measured
    with monkeypatch.context() as patch:
        casm_toys.interrupt(patch, step)
        with pytest.raises(casm_toys.CutError):
            train(casm_toys.request(shards, tmp_path / "cut", val=val), print)
    train(casm_toys.request(shards, tmp_path / "cut", val=val, resume=True), print)
    assert casm_toys.files(tmp_path / "cut") == whole
    assert [line["step"] for line in lines(tmp_path / "cut")] == [6, 12, 18]


@pytest.mark.usefixtures("undrawn")
def test_tensorboard_shows_each_step_once_also_after_a_resume(shards, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an optional extra")
    val = [str(write_val(tmp_path / "val", 2))]
    wanted = partial(casm_toys.request, shards, tmp_path / "run", val=val, tensorboard=True)
    with monkeypatch.context() as patch:
        casm_toys.interrupt(patch, 11)
        with pytest.raises(casm_toys.CutError):
            train(wanted(), casm_toys.quiet)
    train(wanted(resume=True), casm_toys.quiet)
    found = events.EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    shown = {event.step: event.value for event in found.Scalars("training/mask_mean")}
    assert shown == {line["step"]: pytest.approx(line["mask_mean"]) for line in casm_toys.log_lines(tmp_path / "run")}
    assert [event.step for event in found.Scalars("training/mask_mean")] == list(range(18))
    assert [event.step for event in found.Scalars("validation/f1")] == [5, 11, 17]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("count", [4, 15])
def test_the_page_is_self_contained_and_shows_the_same_samples_each_time(count, tmp_path):
    training, val = made(), write_val(tmp_path / "val", count, **ODD)
    measure = validation(val, tmp_path)
    measure(training)
    step(training, 1)
    measure(training)
    pages = [(tmp_path / f"masks/{number}.html").read_text() for number in (3, 4)]
    titles = [re.findall("<h2>(.*?)<", page) for page in pages]
    assert titles[0] == titles[1]
    assert len(set(titles[0])) == len(titles[0]) == min(2 * count, SHOWN)
    for page in pages:
        assert set(re.findall(r'(?:src|href)="([^:]*:[^;"]*)', page)) == {"data:image/webp"}
        assert "http" not in re.sub(r'"data:[^"]*"', "", page).replace("http-equiv", "")
        assert "default-src 'none'" in page
        assert str(tmp_path) not in page
    shown = Counter(re.findall(r"\((right|wrong|hit|miss)\)", pages[0]))
    assert shown["right"] + shown["wrong"] >= len(titles[0]) - 3
    assert "&lt;0&gt;" in pages[0]
    assert pages[0].count("<image ") >= 3 * (len(titles[0]) - 1)
    assert pages[0].count('class="found"') > pages[0].count('class="given"') > 0
    assert "Masks after 4 steps" in pages[1]


@pytest.mark.usefixtures("undrawn")
def test_one_page_shows_the_same_images_over_the_training(tmp_path):
    training, val = made(), write_val(tmp_path / "val", 3, **ODD)
    measure = validation(val, tmp_path)
    for _ in range(10):
        measure(training)
        step(training, 1)
    page = (tmp_path / "masks/epochs.html").read_text()
    with np.load(tmp_path / "masks/12.npz") as masks:
        area = next(iter(masks.values())).mean() / 255
    assert re.findall(r"step (\d+): [\d.]+ removed</p>", page)[:8] == ["3", "4", "6", "7", "8", "9", "11", "12"]
    assert f"step 12: {area:.2f} removed</p>" in page
    titles = re.findall("<h2>(.*?)<", page)
    assert titles == re.findall("<h2>(.*?)<", (tmp_path / "masks/12.html").read_text())
    measure.cut(5)
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
        *("3.html", "3.npz", "4.html", "4.npz", "5.html", "5.npz", "epochs.html"),
    ]
    measure(training)
    page = (tmp_path / "masks/epochs.html").read_text()
    assert re.findall(r"step (\d+): [\d.]+ removed</p>", page)[:4] == ["3", "4", "5", "13"]


def test_a_page_without_any_image(tmp_path):
    val = write_val(tmp_path / "val", 1, k0={"jpg": b"none"}, k1={"jpg": b"none", "cls": "8"})
    found = validation(val, tmp_path)(made())
    assert (found["le"], found["f1"], found["top1"], found["damaged"]) == (100, 0, 0, 2)
    assert found["mask_mean"] != found["mask_mean"]
    assert lines(tmp_path)[0]["mask_mean"] is None
    assert "the image member is not an image" in (tmp_path / "masks/3.html").read_text()
    assert (tmp_path / "curves.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_shards_that_cannot_serve_are_refused_at_once(tmp_path):
    none = {f"k{number}": {"json": "{}" if number % 2 else "[]"} for number in range(6)}
    with pytest.raises(UserError, match=r"--val: none of the samples has boxes.*saltern pack --boxes"):
        validation(write_val(tmp_path / "none", 3, **none), tmp_path)
    late = write_val(tmp_path / "late", 3, **{key: none[key] for key in ("k0", "k1", "k2", "k3")})
    assert validation(late, tmp_path / "out")(made())["with_boxes"] == 2
    shards = expand([str(write_val(tmp_path / "cut", 3))])[0]
    with closing(Path(shards[1].url).open("r+b")) as tar:
        tar.truncate(2000)
    shards = expand([str(tmp_path / "cut")])[0]
    with pytest.raises(UserError, match=r"--val: a shard is broken: .*val-1"):
        Validation(shards, tmp_path, Preprocess(SIDE, SIDE), **HOW)
    Path(shards[1].url).unlink()
    with pytest.raises(UserError, match=r"--val: a shard cannot be read: .*val-1"):
        Validation(shards, tmp_path, Preprocess(SIDE, SIDE), **HOW)
