"""Models that compare images with texts: their classifiers against open_clip called by hand."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clips import COLOURS, RESNET, SIGLIP, TIMM, VIT, by_hand, own, stored

from saltern.pipeline.methods import available, build
from saltern.pipeline.models.classifiers import load
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.prompts import Prompts

pytestmark = pytest.mark.slow
PROMPTS = Prompts(("dog", "cat", "red fox"), (("dog",), ("cat", "kitten"), ("fox",)), ("a photo of a {}.", "my {}"))
TEXTS = [
    ["a photo of a dog.", "my dog"],
    ["a photo of a cat.", "my cat", "a photo of a kitten.", "my kitten"],
    ["a photo of a fox.", "my fox"],
]
TOWERS = {"vit": VIT, "siglip": SIGLIP, "resnet": RESNET}


def images(config: dict[str, Any]) -> torch.Tensor:
    side = config["vision_cfg"]["image_size"]
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, Any]]:
    config = TOWERS[request.param]
    return stored(tmp_path / "clip", config), tmp_path / "clip", config


def test_logits_and_gradients_are_those_of_open_clip_called_by_hand(tower: tuple[str, Path, dict[str, Any]]) -> None:
    name, folder, config = tower
    made = load(name, prompts=PROMPTS)
    x_BCHW = images(config).requires_grad_()
    expected_BK = by_hand(folder, TEXTS, x_BCHW)
    assert expected_BK.std() > 0.1
    torch.testing.assert_close(made.model(x_BCHW), expected_BK, rtol=1e-5, atol=2e-5)
    (expected_BCHW,) = torch.autograd.grad(expected_BK[:, 1].sum(), x_BCHW)
    with build("gradient", made.model, value="signed", reduce="sum") as method:
        map_BHW = method(x_BCHW.detach(), torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(map_BHW, expected_BCHW.sum(1), rtol=1e-3, atol=1e-5 * float(expected_BCHW.abs().max()))
    assert made.class_names == ["dog", "cat", "red fox"]
    assert made.preprocess == Preprocess(
        *(config["vision_cfg"]["image_size"],) * 2, False, "bicubic", *map(tuple, COLOURS.values())
    )


def test_a_tower_of_timm_gives_the_logits_of_open_clip_at_any_shape(tmp_path: Path) -> None:
    name, shape = stored(tmp_path / "clip", TIMM), (32, 48)
    x_BCHW = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BK = by_hand(tmp_path / "clip", TEXTS, x_BCHW, force_image_size=shape)
        for weights in ("DEFAULT", str(tmp_path / "clip" / "open_clip_model.safetensors")):
            made = load(name, weights, side=shape, prompts=PROMPTS)
            torch.testing.assert_close(made.model(x_BCHW), expected_BK, rtol=1e-4, atol=1e-4)
    with build("grad-cam", made.model, input_side=shape) as method:
        assert method.layer == ["visual.trunk.blocks.11.norm1"]
        assert method(x_BCHW).shape == (2, 2, 3)


def test_a_model_of_the_user_may_compare_texts() -> None:
    made, model = load("clips:own", prompts=PROMPTS), own().eval()
    x_BCHW = images(VIT)
    with torch.no_grad():
        image_BD = model.encode_image(x_BCHW, normalize=True)
        fox_2D = model.encode_text(model.tokenizer(TEXTS[2]), normalize=True)
        fox_D = torch.nn.functional.normalize(fox_2D.mean(0), dim=0)
        expected_B = model.logit_scale.exp() * image_BD @ fox_D
        torch.testing.assert_close(made.model(x_BCHW)[:, 2], expected_B, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="clips:without_tokenizer compares images with texts, and lacks tokenizer; set"):
        load("clips:without_tokenizer", prompts=PROMPTS)


def test_a_text_that_would_be_cut_is_refused() -> None:
    long = "a photo of a dog that runs over a lawn behind a red ball with a black cat"
    with pytest.raises(UserError, match=r"'a photo of a dog that runs over a lawn b'... has 20 tokens, .* reads 16"):
        load("clips:own", prompts=Prompts(("dog", "b"), ((long,), ("b",))))


def test_the_text_tower_is_dropped_and_the_digest_covers_both_towers(tmp_path: Path) -> None:
    name = stored(tmp_path / "clip", VIT)
    made, other = load(name, prompts=PROMPTS), load(name, prompts=Prompts(("a", "b"), (("a",), ("b",))))
    assert {key.partition(".")[0] for key in made.model.state_dict()} == {"visual", "head"}
    assert made.digest == other.digest != load(stored(tmp_path / "2", VIT, seed=1), prompts=PROMPTS).digest
    assert made.prompts is not None
    assert other.prompts is not None
    assert made.prompts.digest != other.prompts.digest


def test_embeddings_that_were_made_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = stored(tmp_path / "clip", VIT)
    made = load(name, prompts=PROMPTS)
    monkeypatch.setattr("saltern.pipeline.models.texts.embed", None)
    again = load(name, prompts=made.prompts)
    assert torch.equal(again.model.head.weight, made.model.head.weight)
    assert again.prompts == made.prompts


def test_weights_from_a_file_and_random_ones(tmp_path: Path) -> None:
    name = stored(tmp_path / "clip", VIT)
    weights = str(tmp_path / "clip" / "open_clip_model.safetensors")
    stored(tmp_path / "other", VIT, seed=1)
    other = f"open_clip:local-dir:{tmp_path / 'other'}"
    assert load(other, weights, prompts=PROMPTS).digest == load(name, prompts=PROMPTS).digest
    assert load(other, "none", seed=3, prompts=PROMPTS).digest == load(name, "none", seed=3, prompts=PROMPTS).digest


def test_inputs_of_other_shapes_have_resized_position_embeddings(tmp_path: Path) -> None:
    name, shape = stored(tmp_path / "clip", VIT), (48, 32)
    x_BCHW = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BK = by_hand(tmp_path / "clip", TEXTS, x_BCHW, force_image_size=shape)
        for weights in ("DEFAULT", str(tmp_path / "clip" / "open_clip_model.safetensors")):
            made = load(name, weights, side=shape, prompts=PROMPTS)
            torch.testing.assert_close(made.model(x_BCHW), expected_BK, rtol=1e-5, atol=2e-5)
    with build("grad-cam", made.model, input_side=shape) as method:
        assert method.layer == ["visual.transformer.resblocks.1.ln_1"]
        assert method(x_BCHW).shape == (2, 6, 4)
    resnet = stored(tmp_path / "resnet", RESNET)
    with pytest.raises(UserError, match="cannot load open_clip:local-dir:"):
        load(resnet, side=(64, 96), prompts=PROMPTS)


def test_every_method_explains_a_prompt_or_refuses_in_one_line(tower: tuple[str, Path, dict[str, Any]]) -> None:
    name, _, config = tower
    made, x_BCHW = load(name, prompts=PROMPTS), images(config)
    side, target_B, refused = x_BCHW.shape[-1], torch.tensor([0, 1, 2]), {}
    shown: list[str] = []
    half = {"window": side // 2, "stride": side // 2}
    few: dict[str, Any] = {"cameras": {"sizes": [side]}, "occlusion": half, "rise": {"masks": 8}}
    for kind in sorted(set(available()) - {"casm", "localizer"}):
        try:
            with build(kind, made.model, input_side=side, **few.get(kind, {})) as method:
                map_Bhw = method(x_BCHW, target_B)
                assert not method.last.nonfinite_B.any(), kind
        except UserError as error:
            refused[kind] = str(error)
            continue
        assert len(map_Bhw) == 3, kind
        shown += [kind] * bool(map_Bhw.any())
    assert "cam needs a linear head right after global average pooling" in refused["cam"]  # features are normalised
    assert not any("\n" in line for line in refused.values())
    assert {"layer-cam", "hires-cam", "gradient", "occlusion"} & set(shown)
    assert len(shown) > 8
    assert not {"grad-cam", "layer-cam", "score-cam", "gradient", "smoothgrad", "occlusion", "eigen-cam"} & set(refused)


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = stored(tmp_path / "clip", VIT)
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda *given, **more: 1 / 0)
    for model, weights, said in (
        ("open_clip:ViT-B-33", "none", r"no model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32", "DEFAULT", r"several weights: give --weights openai, .*none or a file"),
        ("open_clip:ViT-B-32", "laion", r"has no weights 'laion': give"),
        (name, "DEFAULT", r"cannot load open_clip:local-dir:.*offline, give files"),
        (f"{name}-not", "DEFAULT", r"cannot load open_clip:local-dir:.*-not"),
        ("making:tiny", "DEFAULT", r"--prompts: making:tiny has classes of its own"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            load(model, weights, prompts=PROMPTS)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="has no classes: give --prompts"):
        load(name, "none")
