"""Extractions whose classes are texts: prompts, templates, the dataset's names, what a run stores of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clips import VIT, by_hand, stored
from commands import call
from extracting import extract
from making import picture, write_tar

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.extract.prompts import given_prompts
from saltern.pipeline.metrics.evaluate import EvaluateRequest, evaluate
from saltern.pipeline.metrics.sanity.run import SanityRequest, sanity
from saltern.pipeline.models import texts
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.runs.verify import verify
from saltern.pipeline.shards.decode import decode
from saltern.schemas.errors import UserError
from saltern.schemas.saliency import read_metadata

pytestmark = pytest.mark.slow
NAMES = {"0": "tabby_cat", "3": "dog", "7": "red fox"}
HOW: dict[str, Any] = {"layer": None, "method": "grad-cam", "resize": 32, "crop": 32}


@pytest.fixture
def model(tmp_path: Path) -> str:
    return stored(tmp_path / "clip", VIT)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    samples = ((f"k{label}", {"jpg": picture(label), "cls": str(label)}) for label in (0, 3, 7, 5))
    write_tar(tmp_path / "shards" / "s.tar", samples)
    (tmp_path / "shards" / "classes.json").write_text(json.dumps(NAMES))
    return tmp_path / "shards"


def rows(run: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(run / "data" / "s.parquet").to_pylist())


def test_the_names_of_the_dataset_are_the_classes_by_default(
    model: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert extract(shards, out, model=model, **HOW) == 0
    said = capsys.readouterr().err
    assert "prompts: 3 classes by the class names of the dataset, as 'a photo of a tabby cat.'" in said
    store, run = load_run_folder(str(out))
    assert run.class_names == list(NAMES.values())
    assert verify(store, run).findings == []
    made = rows(out)
    # Class 5 has no name, so that it is no class of the model.
    assert [row["status"] for row in made] == ["ok", "ok", "ok", "missing_label"]
    assert [row["target"] for row in made[:3]] == [0, 1, 2]
    x_BCHW = torch.stack([torch.from_numpy(decode(picture(n), run.config.preprocess).pixels_HWC) for n in (0, 3, 7)])
    how = run.config.preprocess
    x_BCHW = ((x_BCHW / 255 - torch.tensor(how.mean)) / torch.tensor(how.std)).permute(0, 3, 1, 2)
    words = [["a photo of a tabby cat."], ["a photo of a dog."], ["a photo of a red fox."]]
    with torch.no_grad():
        score_BK = by_hand(tmp_path / "clip", words, x_BCHW).softmax(1)
    torch.testing.assert_close(torch.tensor([row["score"] for row in made[:3]]), score_BK.diag(), rtol=1e-4, atol=1e-6)
    # Other names in the same order give numbers as they are.
    (shards / "classes.json").write_text(json.dumps({str(at): name for at, name in enumerate("abcdefgh")}))
    assert extract(shards, tmp_path / "all", model=model, **HOW) == 0
    assert [row["target"] for row in rows(tmp_path / "all")] == [0, 3, 7, 5]


def test_a_run_keeps_its_prompts_and_their_embeddings(
    model: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "run", {"prompts": "a dog,a cat", "target": "prompt:A Cat", **HOW}
    assert extract(shards, out, model=model, **given) == 0
    assert {row["target"] for row in rows(out)} == {1}
    _, run = load_run_folder(str(out))
    stored_as, prompts = run.config.to_dict()["prompts"], run.config.prompts
    assert prompts is not None
    assert stored_as["names"] == ["a dog", "a cat"]
    assert len(prompts.raw()) == 2 * VIT["embed_dim"] * 4
    origin = read_metadata(pq.read_schema(out / "data" / "s.parquet"))["config"]["prompts"]
    assert origin == {key: value for key, value in stored_as.items() if key != "embeddings"}
    assert origin["digest"] == prompts.digest
    # A resumed run, and the workers, use the stored embeddings: another machine would make them with other last bits.
    with monkeypatch.context() as patched:
        patched.setattr(texts, "embed", None)
        assert extract(shards, out, model=model, **given) == 0
    before = (out / "data" / "s.parquet").read_bytes()
    assert extract(shards, out, {"overwrite": True}, model=model, **given) == 0
    assert (out / "data" / "s.parquet").read_bytes() == before
    with pytest.raises(UserError, match="prompts: "):
        extract(shards, out, model=model, **{**given, "templates": ["my {}"]})
    assert open_run(str(out)).config.target.number == 1


def test_another_model_on_a_run_is_refused_by_its_name(model: str, shards: Path, tmp_path: Path) -> None:
    """The run's embeddings have another length than the other model's."""
    other = stored(tmp_path / "other", {**VIT, "embed_dim": 20})
    assert extract(shards, tmp_path / "run", model=model, **HOW) == 0
    with pytest.raises(UserError, match=r"holds a run with another config: model: .*/other' requested.*--overwrite"):
        extract(shards, tmp_path / "run", model=other, **HOW)


def test_several_methods_are_judged_in_half_precision_too(model: str, shards: Path, tmp_path: Path) -> None:
    given = {**HOW, "method": "grad-cam,gradient", "prompts": "a dog,a cat", "target": "top:2", "model": model}
    assert extract(shards, tmp_path / "runs", **given) == 0
    assert extract(shards, tmp_path / "half", precision="bf16", **given) == 0
    scores = [[row["score"] for row in rows(tmp_path / kind / "grad-cam")] for kind in ("runs", "half")]
    np.testing.assert_allclose(*scores, atol=0.05)  # softmax of cosines times 14
    run = str(tmp_path / "runs" / "grad-cam")
    judged = evaluate(EvaluateRequest([run], [], ["confidence"], torch_threads=1), RunOptions(run, engine="local"))
    (found,) = judged.runs
    assert found.estimates["average_drop"].count == 4
    randomised = sanity(SanityRequest(run, 2, stages=2), RunOptions(run, engine="local", device="cpu"))
    assert randomised.summary["model"] == model


def test_prompts_on_the_command_line_and_in_a_config(model: str, shards: Path, tmp_path: Path) -> None:
    common = ["extract", str(shards), "--model", model, "--method", "grad-cam", "--device", "cpu", "--target"]
    words = ["prompt:cat", "--prompts", "dog,cat", "--template", "my {}", "--template", "a {}"]
    ended = call(*common, *words, "--out", str(tmp_path / "run"))
    assert ended.returncode == 0, ended.stderr
    prompts = load_run_folder(str(tmp_path / "run"))[1].config.prompts
    assert prompts is not None
    assert prompts.texts() == [["my dog", "a dog"], ["my cat", "a cat"]]
    (tmp_path / "c.toml").write_text('prompts = "dog,cat"\ntemplate = ["my {}", "a {}"]\n')
    ended = call(*common, "prompt:cat", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run"))
    assert "1 of 1 shards done, 0 to do" in ended.stderr


def test_one_prompt_is_enough(model: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extract(shards, tmp_path / "run", model=model, prompts="a dog", target="prompt:a dog", **HOW) == 0
    assert "prompts: one class, whose score is 1 for every image" in capsys.readouterr().err
    assert {(row["score"], row["target"]) for row in rows(tmp_path / "run")} == {(1.0, 0)}
    assert any(np.any(row.map() > 0) for row in open_run(str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (
            "tench, Tinca tinca\n\nmy dog\n",
            "p.txt",
            {"tench, Tinca tinca": ["tench, Tinca tinca"], "my dog": ["my dog"]},
        ),
        ('["dog", "cat"]', "p.json", {"dog": ["dog"], "cat": ["cat"]}),
        ('{"dog": "a dog", "cat": ["a cat", "a kitten"]}', "p.json", {"dog": ["a dog"], "cat": ["a cat", "a kitten"]}),
        ('{"7": "seven", "3": ["three", "a 3"]}', "p.json", {"7": ["seven"], "3": ["three", "a 3"]}),
    ],
)
def test_files_of_prompts(content: str, name: str, expected: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "templates.txt").write_text("a {}\n\nthe {} or {}\n")
    prompts = given_prompts(str(tmp_path / name), ["my {}", str(tmp_path / "templates.txt")])
    assert prompts is not None
    assert dict(zip(prompts.names, map(list, prompts.words), strict=True)) == expected
    assert prompts.templates == ("my {}", "a {}", "the {} or {}")
    first = prompts.words[0][0]
    assert prompts.texts()[0][:3] == [f"my {first}", f"a {first}", f"the {first} or {first}"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": "dog,,cat"}, "--prompts dog,,cat: a prompt is empty"),
        ({"prompts": "dog,cat,dog"}, "'dog' is given twice"),
        ({"prompts": "no.txt"}, "--prompts no.txt cannot be read"),
        ({"prompts": "dog,cat", "templates": ["a photo"]}, r"--template 'a photo' has no \{\}"),
        (
            {"prompts": "dog,cat", "target": "prompt:dag"},
            r"--target prompt:dag: no prompt has this name; there are 'dog'",
        ),
        ({"model": "making:tiny", "layer": "body", "prompts": "dog"}, "--prompts: making:tiny has classes of its own"),
        (
            {"model": "making:tiny", "layer": "body", "templates": ["a {}"]},
            "--template needs --prompts and a model of images",
        ),
        ({"model": "making:tiny", "layer": "body", "target": "prompt:dog"}, "needs a model of images and texts"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(
    given: dict[str, Any], said: str, model: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        extract(shards, tmp_path / "run", **{"model": model, **HOW, **given})
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_model_of_texts_without_prompts_or_names_is_refused(model: str, shards: Path, tmp_path: Path) -> None:
    (shards / "classes.json").unlink()
    with pytest.raises(UserError, match="has no classes, and the shards have no class names: give --prompts"):
        extract(shards, tmp_path / "run", model=model, **HOW)


def test_damaged_prompts_in_a_file_are_named(tmp_path: Path) -> None:
    for content, said in (('{"dog": 3}', "give {.dog.*and not 3"), ("[1]", "and not 1"), ("{", "is no JSON")):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(UserError, match=said):
            given_prompts(str(tmp_path / "p.json"), ())
