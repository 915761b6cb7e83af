"""Presets of timm and torchvision, and a run's changes to them: what is carried, what is refused."""

import sys
import types
from dataclasses import replace

import making
import pytest

from saltern.pipeline.models.classifiers import load
from saltern.pipeline.models.presets import Preset, adapt, of_timm
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError

CENTER = {
    "input_size": (3, 224, 224), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4),
}  # fmt: skip


def test_every_value_of_timms_config_is_carried():
    assert of_timm(CENTER).preprocess == Preprocess(256, 224, False, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    squash = of_timm({**CENTER, "crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"})
    wide = of_timm({**CENTER, "input_size": (3, 128, 256), "crop_pct": 1.0})
    assert wide.preprocess == Preprocess(128, (128, 256), False, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert not wide.unusual
    assert squash == Preset(Preprocess(224, 224, True, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop_mode": "squash", "crop_pct": 0.95}, "squash, crop_pct 0.95"),
        ({"crop_mode": "border"}, "border"),
        ({"input_size": (3, 1024, 768)}, "3 x 1024 x 768"),
        ({"input_size": (1, 28, 28)}, "1 x 28 x 28"),
        ({"crop_pct": 1.15}, "crop_pct 1.15"),
        ({"interpolation": "lanczos"}, "lanczos"),
    ],
)
def test_a_preset_that_cannot_be_expressed_has_to_be_replaced(change, said):
    preset = of_timm({**CENTER, **change})
    with pytest.raises(UserError, match=rf"{said}.*--crop N with --resize N or --squash"):
        adapt(preset)
    assert adapt(preset, crop=96, squash=True).squash
    assert adapt(preset, crop=96, resize=100) == replace(preset.preprocess, crop=96, resize=100, squash=False)


def test_a_timm_model_brings_its_preset(monkeypatch):
    made = types.ModuleType("timm")
    made.is_model = lambda name: True
    made.create_model = lambda name, pretrained: making.tiny()
    made.data = types.SimpleNamespace(
        resolve_model_data_config=lambda model: {**CENTER, "crop_mode": "squash", "crop_pct": 1.0}
    )
    monkeypatch.setitem(sys.modules, "timm", made)
    loaded = load("timm:any", "none")
    assert loaded.preprocess.squash
    assert loaded.classes == 5


SQUASHED = Preset(Preprocess(224, 224, True))


def test_squash_is_the_presets_unless_the_run_says_otherwise():
    assert adapt(SQUASHED).squash
    assert not adapt(SQUASHED, squash=False).squash
    assert adapt(Preset(Preprocess()), squash=True).squash
    assert adapt(SQUASHED, crop=96).crop == 96
    with pytest.raises(UserError, match="--resize 256 has no effect on squashed images; give --no-squash"):
        adapt(SQUASHED, resize=256)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, "--mean 123.675,116.28,103.53: .* divide values for 0..255 by 255"),
        ({"std": (58.395, 57.12, 57.375)}, "--std .* larger than 0 and at most 1"),
        ({"std": (0.2, 0.0, 0.2)}, "--std 0.2,0,0.2"),
        ({"mean": (0.5, float("nan"), 0.5)}, "--mean 0.5,nan,0.5"),
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"crop": 300}, "the weights' resize, 256, is smaller than --crop 300.*; give --resize 300 or more"),
        ({"crop": 300, "resize": 280}, "--resize 280 is smaller than --crop 300.*; give --resize 300 or more"),
        ({"crop": -1}, "--crop -1"),
    ],
)
def test_impossible_values_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        adapt(Preset(Preprocess()), **changes)
