"""The family `masked` gives the numbers of loops over images and classifiers, and draws them."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from extracting import extract
from judges import other
from making import picture, write_tar
from PIL import Image
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.maps.discretize import discretize
from saltern.pipeline.metrics.controls import control, sample_seeds
from saltern.pipeline.metrics.evaluate import EvaluateRequest, Evaluation, evaluate
from saltern.pipeline.models import classifiers
from saltern.pipeline.runs.manifest import load_run
from saltern.pipeline.runs.reader import Row, SaliencyRun, open_run
from saltern.pipeline.shards.decode import decode
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import EvaluateConfig
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import CONTROLS, FOUND
from saltern.schemas.saliency import DECODE_FAILED

OWN = ((0.4, 0.5, 0.6), (0.3, 0.2, 0.25))  # mean and std of the run
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of a factory
COLUMNS = ("whole", "masked_in", "masked_out", "inpainted")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight samples; the second image is broken, the fourth has no label."""
    folder = tmp_path_factory.mktemp("masked")
    samples = []
    for at in range(8):
        members: dict[str, bytes] = {"jpg": b"no image" if at == 1 else picture(at, 44, 60)}
        samples.append((f"k{at}", members if at == 3 else {**members, "cls": str(at % 5).encode()}))
    write_tar(folder / "shards/0.tar", samples)
    mean, std = OWN
    assert extract(folder / "shards", folder / "run", target="top1", mean=mean, std=std, save_map=False) == 0
    return folder / "run"


def judge(run: Path, *further: str, metrics: tuple[str, ...] = ("masked",)) -> Evaluation:
    request = EvaluateRequest([str(run)], metrics=metrics, classifiers=further, batch_size=3, torch_threads=1)
    return evaluate(request, RunOptions(str(run), engine="local", device="cpu"))


def naive(pixels_HWC: np.ndarray, mask_HW: np.ndarray, label: int) -> dict[str, list[bool]]:
    """Return whether each of the two classifiers is right on each kind of the image."""
    own = classifiers.load("making:tiny", seed=0, side=32).model
    filled = cv2.inpaint(pixels_HWC, mask_HW.astype(np.uint8), 3, cv2.INPAINT_TELEA)
    inside = mask_HW[..., None]
    images = (pixels_HWC, pixels_HWC * inside, pixels_HWC * ~inside, filled if not mask_HW.all() else filled * 0)
    found: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    for model, (mean, std) in ((own, OWN), (other(), IMAGENET)):
        for name, image in zip(COLUMNS, images, strict=True):
            x_HWC = (image / 255 - np.array(mean)) / np.array(std)
            with torch.no_grad():
                logits_1K = model(torch.from_numpy(x_HWC).permute(2, 0, 1)[None].float())
            found[name].append(int(logits_1K.argmax()) == label)
    return found


def judged(opened: SaliencyRun) -> dict[str, tuple[Row, torch.Tensor]]:
    """Return the rows that can be judged, with their pixels, by key."""
    pairs = [(sample, rows[0]) for shard in opened.shards for sample, rows in opened.joined(shard)]
    return {
        row.key: (row, torch.from_numpy(decode(sample.image or b"", opened.config.preprocess).pixels_HWC))
        for sample, row in pairs
        if row.status == "ok" and row.label is not None
    }


@pytest.mark.slow
def test_the_values_are_those_of_loops(run: Path) -> None:
    evaluation = judge(run, "judges:other")
    opened = open_run(str(run))
    rows = judged(opened)
    assert len(rows) == 6
    pixels_BHWC = torch.stack([pixels_HWC for _, pixels_HWC in rows.values()])
    seen = set()
    for subject in (FOUND, *CONTROLS):
        folder = run / f"metrics/masked{'-controls' * (subject != FOUND)}/data"
        kept = {row["key"]: row for row in pq.read_table(folder).to_pylist() if row["subject"] == subject}
        if subject == FOUND:
            masks = [row.mask() for row, _ in rows.values()]
        else:
            map_BHW = control(subject, pixels_BHWC, sample_seeds(opened.config.seed, list(rows)))
            masks = list(discretize(map_BHW, opened.config.discretize)[0].numpy())
        expected = {
            key: naive(pixels_HWC.numpy(), mask_HW, row.label)
            for (key, (row, pixels_HWC)), mask_HW in zip(rows.items(), masks, strict=True)
        }
        assert {key: {name: kept[key][name] for name in COLUMNS} for key in expected} == expected
        for key in set(kept) - set(expected):
            assert [kept[key][name] for name in COLUMNS] == [None] * 4
        estimates = evaluation.runs[0].estimates if subject == FOUND else evaluation.controls[subject]
        for name in ("masked_in", "masked_out", "inpainted"):
            values = [right for own in expected.values() for right in own[name]]
            assert estimates[name].value == pytest.approx(np.mean(values))
            assert estimates[name].count == 6
            seen |= set(values)
    assert seen == {True, False}
    rows_by_key = {row["key"]: row["status"] for row in pq.read_table(run / "metrics/masked/data").to_pylist()}
    assert rows_by_key["k1"] == DECODE_FAILED
    summary = json.loads((run / "metrics/masked.json").read_text())["metrics"]
    each = [summary[f"masked_in@{name}"]["value"] for name in ("making:tiny", "judges:other")]
    assert np.mean(each) == pytest.approx(summary["masked_in"]["value"])
    assert summary["whole@judges:other"]["count"] == 6
    width, height = Image.open(io.BytesIO((run / "metrics/masked.png").read_bytes())).size
    assert width > height > 300


@pytest.mark.slow
def test_the_config_names_the_classifiers_and_others_are_judged_again(run: Path) -> None:
    judge(run, "judges:other")
    stored = load_run(Store(str(run / "metrics/masked")))
    assert stored is not None
    (further,) = stored.config_of(EvaluateConfig).classifiers
    assert (further.model, further.weights, len(further.digest)) == ("judges:other", "DEFAULT", 64)
    assert (further.mean, further.std) == IMAGENET
    assert judge(run).runs[0].estimates["masked_in"].count == 6
    lists = pq.read_table(run / "metrics/masked/data")["masked_in"].to_pylist()
    assert {len(one) for one in lists if one is not None} == {1}


def test_wrong_classifiers_are_refused_in_one_line(run: Path) -> None:
    for words, reason in (
        (("judges:seven",), "judges:seven has 7 classes, the run's making:tiny has 5: they must be the same"),
        (("making:tiny",), "names making:tiny twice, or it is the run's own model"),
        (("judges:other", ""), "a name is empty"),
        (("judges:other", "judges:other"), "names judges:other twice"),
        (("judges:nobody",), "nobody"),
    ):
        with pytest.raises(UserError, match=reason):
            judge(run, *words)
    with pytest.raises(UserError, match="--classifiers are for --metric masked"):
        judge(run, "judges:other", metrics=["pixels"])


@pytest.mark.slow
def test_the_command(run: Path) -> None:
    words = ["evaluate", str(run), "--metric", "masked-in", "--classifiers", "judges:other", "--format", "csv"]
    ended = CliRunner().invoke(app, [*words, "--engine", "local", "--device", "cpu"])
    assert ended.exit_code == 0, ended.output
    lines = ended.stdout.splitlines()
    assert len(lines) == 7
    assert lines[1].startswith("grad-cam of making:tiny,masked-in,more,")
