"""The attack fools the model, stays within its budget and, if guided, within its map. It resumes as any run."""

import hashlib
import io
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from making import HELPERS, files, picture, write_shards, write_tar
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.extract.request import ExtractRequest, MethodRequest
from saltern.pipeline.runs import reader
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.verify import verify
from saltern.pipeline.synthesis.attack import AttackRequest, attacking
from saltern.pipeline.synthesis.attack_report import means
from saltern.pipeline.synthesis.perturb import perturb, unit, weighed_norm
from saltern.schemas.attack import attack_schema
from saltern.schemas.config import PGD, UNMARKED
from saltern.schemas.errors import UserError

HOW = PGD(steps=20, step_size=1 / 255, epsilon=12 / 255, beta=50.0, rule="sign")
REQUEST = ExtractRequest(
    shards=[], model="making:tiny", method="grad-cam", layer="body", resize=40, crop=32, batch_size=4, torch_threads=1
)


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def attack(shards: Path, out: Path, wishes: dict[str, Any] | None = None, **options: Any) -> int:
    save_images = options.pop("save_images", True)
    common = {field.name: getattr(REQUEST, field.name) for field in fields(MethodRequest)}
    given = {**common, "shards": [str(shards)], **(wishes or {})}
    request = AttackRequest(**given, pgd=replace(HOW, **options), save_images=save_images)
    return conduct(attacking(request), RunOptions(str(out), device="cpu", engine="local")).code


def rows(out: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted(out.glob("data/**/*.parquet"))]
    found: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return found


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image).astype(np.float64) / 255


class Sharp(nn.Module):
    """A linear classifier of 5 classes over 16 x 16 images: its best attack is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight_KN = nn.Parameter(torch.randn(5, 768, generator=draw))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW - 0.5).flatten(1) @ self.weight_KN.T


def images(count: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    image_BCHW = torch.randint(90, 166, (count, 3, 16, 16), generator=draw).double() / 255
    image_BCHW[:, :, 0], image_BCHW[:, :, 1] = 0, 1  # where only one direction is left
    return image_BCHW


def halves(count: int) -> Tensor:
    """Return a map that allows only the left half."""
    map_BHW = torch.zeros(count, 16, 16, dtype=torch.float64)
    map_BHW[:, :, :8] = 1
    return map_BHW


@pytest.mark.parametrize("rule", ["normalised", "sign"])
def test_plain_pgd_fools_within_its_budget(rule: Any) -> None:
    model, image_BCHW = Sharp().double(), images(6)
    target_B = model(image_BCHW).argmin(1)
    p_BCHW = perturb(model, image_BCHW, target_B, replace(HOW, rule=rule, beta=0.0), halves(6))
    logits_BK = model(image_BCHW + p_BCHW)
    assert (logits_BK.argmax(1) == target_B).all()
    assert (logits_BK.softmax(1).gather(1, target_B[:, None]) > 0.99).all()
    assert p_BCHW.abs().max() <= 12 / 255 + 1e-9
    assert p_BCHW.abs().max() > 4 / 255
    assert (image_BCHW + p_BCHW).min() >= -1e-9
    assert (image_BCHW + p_BCHW).max() <= 1 + 1e-9
    levels = p_BCHW * 255
    assert torch.equal(levels.round(), levels.round(decimals=6))  # what an 8-bit file holds


@pytest.mark.parametrize(("rule", "beta"), [("normalised", 500.0), ("sign", 1e4)])
def test_a_guided_perturbation_stays_in_its_map(rule: Any, beta: float) -> None:
    model, image_BCHW = Sharp().double(), images(6)
    target_B = model(image_BCHW).argmin(1)
    free = perturb(model, image_BCHW, target_B, replace(HOW, rule=rule, beta=0.0), halves(6))
    kept = perturb(model, image_BCHW, target_B, replace(HOW, rule=rule, beta=beta), halves(6))
    assert (model(image_BCHW + kept).argmax(1) == target_B).all()
    assert kept[..., 8:].norm() < 0.3 * free[..., 8:].norm()
    assert kept[..., :8].norm() > 0.7 * free[..., :8].norm()
    nowhere = perturb(model, image_BCHW, target_B, replace(HOW, rule=rule, beta=1e4), torch.zeros(6, 16, 16).double())
    assert nowhere.norm() < 0.2 * free.norm()


def test_the_best_of_all_iterates_counts() -> None:
    """More steps never give a larger objective."""
    model, image_BCHW = Sharp().double(), images(4)
    target_B = model(image_BCHW).argmin(1)
    losses = []
    for steps in (1, 5, 6, 20, 21):
        p_BCHW = perturb(model, image_BCHW, target_B, replace(HOW, steps=steps), halves(4))
        outside_B = p_BCHW[..., 8:].flatten(1).norm(dim=1)
        loss_B = torch.nn.functional.cross_entropy(model(image_BCHW + p_BCHW), target_B, reduction="none")
        losses.append((loss_B + 50 / 768**0.5 * outside_B).detach())
    assert (torch.stack(losses).diff(dim=0) <= 1e-6).all()


@pytest.mark.parametrize(("norm", "rule"), [("rms", "normalised"), ("l2", "sign")])
def test_a_batch_is_what_its_samples_are_alone(norm: Any, rule: Any) -> None:
    """In float64, because the sign of a slope can depend on its last bit."""
    model, image_BCHW = Sharp().double(), images(5)
    target_B = model(image_BCHW).argmin(1)
    map_BHW = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(2)).double()
    how = replace(HOW, norm=norm, rule=rule, beta=5.0, recompute=3)

    def remap(image_BCHW: Tensor) -> Tensor:
        return unit(image_BCHW.mean(1))

    together = perturb(model, image_BCHW, target_B, how, map_BHW, remap)
    for i in range(5):
        alone = perturb(model, image_BCHW[i : i + 1], target_B[i : i + 1], how, map_BHW[i : i + 1], remap)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)
    assert not torch.equal(together, perturb(model, image_BCHW, target_B, replace(how, recompute=0), map_BHW))


def test_the_slope_of_the_norm_is_autograds() -> None:
    p_BCHW = (images(3) - 0.5).requires_grad_()
    weight_B1HW = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    norm_B = (p_BCHW * weight_B1HW).flatten(1).norm(dim=1)
    norm_B.sum().backward()
    assert p_BCHW.grad is not None
    torch.testing.assert_close(weighed_norm(p_BCHW.detach(), weight_B1HW), (norm_B.detach(), p_BCHW.grad))
    assert not weighed_norm(torch.zeros_like(p_BCHW), weight_B1HW)[1].any()


def test_maps_are_brought_to_one() -> None:
    map_BHW = torch.tensor([[[-2.0, 4.0]], [[0.0, 0.0]]])
    assert torch.equal(unit(map_BHW), torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]]))


@pytest.mark.slow
def test_rows_say_what_their_images_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each number of a row equals that from its stored images, by numpy and the model only."""
    from saltern.pipeline.models.classifiers import load

    write_shards(tmp_path / "in", 2, 5)
    assert attack(tmp_path / "in", tmp_path / "run") == 0
    assert "norm reduced by" in capsys.readouterr().out
    classifier = load("making:tiny")
    mean, std = (np.array(v)[:, None, None] for v in (classifier.preprocess.mean, classifier.preprocess.std))

    def probability(image_HWC: np.ndarray) -> np.ndarray:
        x_CHW = (image_HWC.transpose(2, 0, 1) - mean) / std
        with torch.no_grad():
            found = classifier.model(torch.from_numpy(x_CHW[None]).float()).double().softmax(1)
        return found[0].numpy()

    found = rows(tmp_path / "run")
    assert [row["key"] for row in found] == [f"k{i:05}" for i in range(10)]
    for row in found:
        if row["status"] != "ok":
            assert row["status"] == "zero_map"
            continue
        image, map_ = pixels(row["image"]), pixels(row["map"])
        clean = probability(image)
        assert (row["predicted"], row["target"]) == (clean.argmax(), clean.argmin())
        assert row["score"] == pytest.approx(clean.max(), rel=1e-4)
        for side in ("plain", "guided"):
            p = pixels(row[f"{side}_image"]) - image
            assert abs(p).max() <= 12 / 255 + 1e-9
            assert row[f"{side}_norm"] == pytest.approx(np.linalg.norm(p), rel=1e-4)
            outside = np.linalg.norm(p * (1 - map_[..., None]))
            assert row[f"{side}_outside"] == pytest.approx(outside, rel=0.02)  # the map is stored with 8 bits
            after = probability(pixels(row[f"{side}_image"]))
            assert row[f"{side}_score"] == pytest.approx(after[row["target"]], rel=1e-3)
            assert row[f"{side}_fooled"] == (after.argmax() == row["target"])
        assert row["plain_score"] > clean[row["target"]]
        assert row["guided_outside"] < row["plain_outside"]
        assert row["norm_reduction"] == pytest.approx(1 - row["guided_norm"] / row["plain_norm"], rel=1e-4)
    fine = [row for row in found if row["status"] == "ok"]
    assert len(fine) > 5
    said = means(*load_run_folder(str(tmp_path / "run")))
    assert said["images"] == len(fine)
    assert said["guided_score"] == pytest.approx(np.mean([row["guided_score"] for row in fine]))
    with pytest.raises(UserError, match="a run of attack"):
        reader.open_run(str(tmp_path / "run"))
    assert not verify(*load_run_folder(str(tmp_path / "run"))).findings
    with Image.open(tmp_path / "run/attack.png") as strips:
        assert strips.width > 1000


@pytest.mark.slow
def test_a_resume_does_the_rest_alone_and_writes_the_same(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 3, 4)
    assert attack(tmp_path / "in", tmp_path / "whole") == 0
    assert attack(tmp_path / "in", tmp_path / "cut") == 0
    kept = (tmp_path / "cut/receipts/part-000000.json").read_bytes()
    (tmp_path / "cut/receipts/part-000001.json").unlink()  # as a kill before its last write leaves it
    (tmp_path / "cut/data/part-000002.parquet").unlink()
    (tmp_path / "cut/receipts/part-000002.json").unlink()
    assert attack(tmp_path / "in", tmp_path / "cut") == 0
    assert (tmp_path / "cut/receipts/part-000000.json").read_bytes() == kept
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    with pytest.raises(UserError, match=r"beta: 50.0 there, 5.0 requested"):
        attack(tmp_path / "in", tmp_path / "cut", beta=5.0)


def test_an_extraction_is_another_job(tmp_path: Path) -> None:
    from saltern.pipeline.engine.conduct import conduct
    from saltern.pipeline.extract.extraction import extraction

    write_shards(tmp_path / "in", 1, 2)
    assert attack(tmp_path / "in", tmp_path / "run") == 0
    with pytest.raises(UserError, match="job: 'attack' there, 'extract' requested"):
        conduct(
            extraction(replace(REQUEST, shards=[str(tmp_path / "in")])), RunOptions(str(tmp_path / "run"), device="cpu")
        )


def test_a_run_that_names_no_job_is_an_extraction(tmp_path: Path) -> None:
    """Runs from before other jobs existed are resumed, and keep their receipts."""
    from saltern.pipeline.engine.conduct import conduct
    from saltern.pipeline.extract.extraction import extraction

    write_shards(tmp_path / "in", 1, 2)
    request, settings = replace(REQUEST, shards=[str(tmp_path / "in")]), RunOptions(str(tmp_path / "run"), device="cpu")
    assert conduct(extraction(request), settings).code == 0
    made = json.loads((tmp_path / "run/run.json").read_text())
    assert (made["config"].pop("job"), made["config"].pop("job_options")) == ("extract", {})
    marked = {name: value for name, value in made["config"].items() if name not in UNMARKED}
    raw = json.dumps({"schema_version": 1, **marked}, sort_keys=True)
    assert made["fingerprint"] == hashlib.sha256(raw.encode()).hexdigest()[:16]
    del made["seal"]
    made["versions"]["saltern"] = "0.1.0"
    (tmp_path / "run/run.json").write_text(json.dumps(made))
    before = (tmp_path / "run/receipts/part-000000.json").read_bytes()
    assert conduct(extraction(request), settings).code == 0
    assert (tmp_path / "run/receipts/part-000000.json").read_bytes() == before


def test_bad_samples_keep_a_row(tmp_path: Path) -> None:
    samples: list[tuple[str, dict[str, bytes | str]]] = [
        ("good", {"jpg": picture(0)}),
        ("text", {"jpg": b"not an image"}),
        ("none", {"cls": "1"}),
        ("good", {"jpg": picture(1)}),
        ("last", {"jpg": picture(2), "cls": "words"}),
    ]
    write_tar(tmp_path / "in/a.tar", samples)
    assert attack(tmp_path / "in", tmp_path / "run", {"batch_size": 2}, save_images=False) == 1  # less than half are ok
    found = rows(tmp_path / "run")
    statuses = [row["status"] for row in found]
    assert statuses[1:4] == ["decode_failed", "missing_image", "duplicate_key"]
    assert {statuses[0], statuses[4]} <= {"ok", "zero_map"}
    assert all(row["error"] and row["plain_score"] is None for row in found[1:4])
    assert all(
        row["image"] is None and row["plain_image"] is None and row["plain_score"] for row in (found[0], found[4])
    )
    assert attack_schema().names == list(found[0])
    assert not (tmp_path / "run/attack.png").exists()
    assert not verify(*load_run_folder(str(tmp_path / "run"))).findings


def test_the_command(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 3)
    words = ["attack", str(tmp_path / "in"), "--out", str(tmp_path / "run"), "--model", "making:tiny"]
    words += ["--layer", "body", "--guide", "grad-cam", "--resize", "40", "--crop", "32", "--steps", "5"]
    words += ["--device", "cpu"]
    ended = CliRunner().invoke(app, [*words, "--epsilon", "8/255"])
    assert ended.exit_code == 0, ended.output
    assert "norm reduced by" in ended.stdout
    status = CliRunner().invoke(app, ["status", str(tmp_path / "run")])
    assert "attack guided by grad-cam of making:tiny" in status.stdout
    assert "norm reduced by" in status.stdout
    ended = CliRunner().invoke(app, [*words, "--epsilon", "eight"])
    assert "--epsilon 'eight' is not a number" in str(ended.exception)


@pytest.mark.parametrize(
    ("wishes", "options", "words"),
    [
        ({"method": "no-such"}, {}, "unknown method"),
        ({}, {"epsilon": 0.0}, "--epsilon above 0"),
        ({}, {"norm": "l1"}, "none of rms, l2"),
        ({}, {"rule": "adam"}, "none of normalised, sign"),
    ],
)
def test_wrong_wishes_are_refused(tmp_path: Path, wishes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    write_shards(tmp_path / "in", 1, 2)
    with pytest.raises(UserError, match=words):
        attack(tmp_path / "in", tmp_path / "run", wishes, **options)
    assert not (tmp_path / "run").exists()
