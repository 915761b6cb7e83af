"""One Preprocess goes through every job: each of its fields reaches the config of each job, and the pixels."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import casm_toys
import making
import pytest
import torch
from extracting import extract

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.training.plan import TrainRequest, make_plan
from saltern.pipeline.extract.explain import Explainer
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.localizer import plan as localizer_plan
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.presets import Preset
from saltern.pipeline.runs.dataset import SaliencyDataset
from saltern.pipeline.shards.decode import decode
from saltern.pipeline.synthesis.attack import AttackRequest
from saltern.pipeline.synthesis.attack import plan as plan_attack
from saltern.pipeline.synthesis.visualize import VisualizeRequest
from saltern.pipeline.synthesis.visualize import plan as plan_visualize
from saltern.pipeline.training.loop import preprocess_of
from saltern.schemas.config import Preprocess

BASE = Preprocess(40, 32, False, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
OTHER = {
    "resize": 48, "crop": 24, "squash": True, "interpolation": "bicubic", "mean": (0.1, 0.2, 0.3),
    "std": (0.3, 0.2, 0.1),
}  # fmt: skip
NORMALISE = Explainer._normalise
PRESETS = [BASE, *(replace(BASE, **{name: value}) for name, value in OTHER.items())]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return str(making.write_shard(tmp_path / "in" / "a.tar", 6))


def of_extract(shards):
    request = ExtractRequest([shards], "making:tiny", "grad-cam", layer="body", torch_threads=1)
    return resolve(request, None, "cpu", 1)[0].config.preprocess


def of_attack(shards):
    request = AttackRequest([shards], "making:tiny", "grad-cam", layer="body", torch_threads=1)
    return plan_attack(request, None, "cpu", 1)[0].config.preprocess


def of_visualize(shards):
    return plan_visualize(VisualizeRequest("0", "making:tiny"), None, "cpu", 1)[0].config.preprocess


def of_training(shards):
    request = TrainRequest(shards=[shards], out="unused", model="making:tiny", hyperparameters=Hyperparameters())
    return preprocess_of(make_plan(request, "cpu", None, lambda text: None).config)


JOBS = [of_extract, of_attack, of_visualize, of_training]


def test_the_changed_values_are_those_of_all_fields():
    assert set(OTHER) == {field.name for field in fields(Preprocess)}


@pytest.mark.parametrize("preset", PRESETS, ids=["base", *OTHER])
@pytest.mark.parametrize("job", JOBS)
def test_each_field_of_a_preset_reaches_the_config_of_each_job(job, preset, shards, monkeypatch):
    model = casm_toys.small() if job is of_training else making.tiny()
    monkeypatch.setattr(classifiers, "_factory", lambda spec, weights: classifiers._Loaded(model, Preset(preset)))
    assert job(shards) == preset


@pytest.mark.parametrize("preset", PRESETS, ids=["base", *OTHER])
def test_a_localizer_sees_images_as_the_run_that_it_learns_from(preset):
    run = SimpleNamespace(config=SimpleNamespace(preprocess=preset))
    assert localizer_plan._preprocess(SimpleNamespace(side=None, model=None), run, None) == preset


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=["base", *OTHER])
def test_each_field_of_a_preset_decides_the_rows_of_a_run_and_the_images_of_its_dataset(
    preset, shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        classifiers, "_factory", lambda spec, weights: classifiers._Loaded(making.tiny(), Preset(preset))
    )
    given = []
    monkeypatch.setattr(
        Explainer, "_normalise", lambda self, pixels: given.append((self, pixels)) or NORMALISE(self, pixels)
    )
    assert extract(shards, tmp_path / "run", resize=None, crop=None, target="top1") == 0
    explain = given[-1][0]
    decoded = decode(making.picture(0), preset).pixels_HWC
    full = next(pixels for _, pixels in given if len(pixels) > 1)
    assert torch.equal(full[0], torch.from_numpy(decoded))
    normalised = (torch.from_numpy(decoded).permute(2, 0, 1) / 255 - explain._mean) / explain._std
    assert explain._mean.flatten().tolist() == pytest.approx(list(preset.mean))
    torch.testing.assert_close(NORMALISE(explain, full)[0], normalised)
    item = next(iter(SaliencyDataset(str(tmp_path / "run"))))
    assert torch.equal(item["image"], torch.from_numpy(decoded).permute(2, 0, 1))
