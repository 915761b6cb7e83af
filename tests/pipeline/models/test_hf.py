"""Image classifiers of transformers from a folder: logits, names, preprocessing, sizes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from extracting import extract
from making import write_shard

from saltern.pipeline.methods import build
from saltern.pipeline.models.classifiers import load
from saltern.pipeline.models.presets import adapt, of_hf
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
NAMES = {0: "cat", 1: "dog", 2: "fox"}
COLOURS = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4)}
X_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(folder: Path, **more: Any) -> str:
    """Write a small transformer with random weights, and return its name for --model."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=8, id2label=NAMES, **more)
    model = transformers.ViTForImageClassification(config)
    for value in model.parameters():
        value.data.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **COLOURS)
    processor.save_pretrained(folder)
    return f"hf:{folder}"


def test_a_folder_is_a_classifier_with_names_and_preprocessing(tmp_path: Path) -> None:
    made = load(vit(tmp_path / "vit"))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
    with torch.no_grad():
        assert torch.equal(made.model(X_BCHW).logits, model(pixel_values=X_BCHW).logits)
    assert (made.classes, made.class_names) == (3, ["cat", "dog", "fox"])
    assert made.preprocess == Preprocess(32, 32, True, "bilinear", *map(tuple, COLOURS.values()))
    with build("grad-cam", made.model, input_side=32) as method:
        assert method.layer == ["vit.layers.1.layernorm_before"]
        assert method(X_BCHW).shape == (2, 4, 4)
    with build("grad-cam", made.model, layer="vit", input_side=32) as method:  # returns BaseModelOutputWithPooling
        assert method(X_BCHW).shape == (2, 4, 4)


def test_an_extraction_by_name_of_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit(tmp_path / "vit")
    write_shard(tmp_path / "shards" / "s.tar", 3)
    monkeypatch.chdir(tmp_path)
    assert extract(tmp_path / "shards", tmp_path / "run", model="hf:vit", layer=None, resize=None, target="top1") == 0
    _, run = load_run_folder(str(tmp_path / "run"))
    assert run.config.model == f"hf:{tmp_path / 'vit'}"
    assert run.class_names == list(NAMES.values())


def test_a_folder_of_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    vit(tmp_path / "vit")
    assert load("hf:~/vit").classes == 3
    with pytest.raises(UserError, match=f"hf:{tmp_path}/other: there is no such folder"):
        load("hf:~/other")


def test_names_of_classes_that_do_not_count_from_0_are_left_out(tmp_path: Path) -> None:
    name = vit(tmp_path / "vit")
    path = tmp_path / "vit" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "id2label": {"1": "cat", "2": "dog", "3": "fox"}}))
    made = load(name)
    assert (made.classes, made.class_names) == (3, None)


def test_other_sizes_and_other_weights(tmp_path: Path) -> None:
    name = vit(tmp_path / "vit")
    larger_BCHW = torch.randn(2, 3, 48, 32)
    made = load(name, side=(48, 32))
    with torch.no_grad():
        expected = made.model.__class__.from_pretrained(tmp_path / "vit").eval()(
            larger_BCHW, interpolate_pos_encoding=True
        )
        assert torch.equal(made.model(larger_BCHW).logits, expected.logits)
    assert load(name).digest == made.digest
    with pytest.raises(UserError, match="must be DEFAULT or none: they are those in its folder"):
        load(name, str(tmp_path / "vit" / "model.safetensors"))
    assert load(name, "none", seed=1).digest == load(name, "none", seed=1).digest != made.digest
    assert load(name, "none").class_names is None


def test_half_weights_are_taken_as_float32(tmp_path: Path) -> None:
    name = vit(tmp_path / "vit")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit").half()
    model.save_pretrained(tmp_path / "vit")
    assert {value.dtype for value in load(name).model.parameters()} == {torch.float32}


def test_what_is_no_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    name = vit(tmp_path / "vit")
    backbone = transformers.ViTModel.from_pretrained(tmp_path / "vit")
    backbone.save_pretrained(tmp_path / "backbone")
    transformers.BertConfig().save_pretrained(tmp_path / "text")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for model, said in (
        (f"hf:{tmp_path / 'backbone'}", r"has no weights for classifier.*: give a model with a trained head"),
        (f"hf:{tmp_path / 'text'}", "is a bert, which is no image classifier"),
        (f"hf:{tmp_path / 'damaged'}", "cannot load hf:.*damaged from the folder"),
        ("hf:nobody/nothing", "cannot load hf:nobody/nothing from the cache, and nothing is downloaded"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            load(model)
        assert "\n" not in str(refusal.value)
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"there is no preprocessor_config.json; without --mean and --std, ImageNet's"):
        adapt(load(name).preset)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("ViT", {"size": {"height": 64, "width": 64}}, (64, 64, True, "bilinear")),
        ("ViT", {"size": {"height": 32, "width": 64}}, (32, (32, 64), True, "bilinear")),
        ("Siglip", {"size": {"height": 64, "width": 64}, "resample": 3}, (64, 64, True, "bicubic")),
        (
            "Bit",
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            (256, 224, False, "bicubic"),
        ),
        ("ConvNext", {"size": {"shortest_edge": 224}}, (256, 224, False, "bicubic")),
        ("ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 1.0}, (384, 384, True, "bicubic")),
    ],
)
def test_image_processors_as_presets(kind: str, values: dict[str, Any], expected: tuple[Any, ...]) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessor")(**values, **COLOURS)
    preset = of_hf(type(processor).__name__, processor.to_dict())
    assert preset.unusual == ""
    assert preset.preprocess == Preprocess(*expected, *map(tuple, COLOURS.values()))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("DeiT", {}),  # squashes to 256, then crops
        ("CLIP", {"do_center_crop": False}),  # of any size
        ("MobileViT", {}),  # BGR
        ("EfficientNet", {}),  # normalises twice
        ("Levit", {}),  # resizes to 8/7 of the size
        ("ViT", {"resample": 1}),  # Lanczos
        ("ViT", {"do_rescale": False}),
    ],
)
def test_image_processors_with_other_steps_are_told(kind: str, values: dict[str, Any]) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessor")(**values)
    assert of_hf(type(processor).__name__, processor.to_dict()).unusual


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    vit(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config |= {
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Net"},
        "model_type": "evil",
    }
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vit" / "evil.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(UserError, match="cannot load hf:"):
        load(f"hf:{tmp_path / 'vit'}")
