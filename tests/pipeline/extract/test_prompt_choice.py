"""Choices of prompts and templates that are refused, or that differ from a run's; labels of text classes."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from clips import VIT, stored
from commands import call
from extracting import extract
from making import picture, write_tar

from saltern.pipeline.extract.prompts import given_prompts, prompts_of_dataset
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.shards.expand import expand
from saltern.schemas.errors import UserError
from saltern.schemas.prompts import number_of

pytestmark = pytest.mark.slow
HOW: dict[str, Any] = {"layer": None, "method": "grad-cam", "resize": 32, "crop": 32}


def shards(folder: Path, names: dict[int, str], labels: tuple[int, ...] = (0, 1)) -> Path:
    write_tar(folder / "shards" / "s.tar", ((f"k{n}", {"jpg": picture(n), "cls": str(n)}) for n in labels))
    (folder / "shards" / "classes.json").write_text(json.dumps(names))
    return folder / "shards"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.json", '{"dog": "a dog", "dog": "a puppy"}', "'dog' is given twice"),
        ("p.json", '{"dog": " "}', "a prompt is empty"),
        ("p.json", '["dog", " "]', "a prompt is empty"),
        ("classes.json", '{"0": "cat", "5": "dog"}', "goes from numbers to names: leave --prompts out"),
        ("fishes.csv", None, "fishes.csv cannot be read"),
        ("lists/fishes", None, "lists/fishes cannot be read"),
    ],
)
def test_prompts_that_are_no_classes_are_refused(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        given_prompts(name if content is None else str(tmp_path / name), ())


def test_templates_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"--template .*empty.txt has no lines"):
        given_prompts("dog,cat", [str(tmp_path / "empty.txt")])
    with pytest.raises(UserError, match=r"--template 'no.txt' has no \{\} .* and is no file"):
        given_prompts("dog,cat", ["no.txt"])


def test_prompts_and_templates_are_lists_or_texts() -> None:
    prompts = given_prompts(["a fish, wet", "a shark"], "my {}")
    assert prompts is not None
    assert prompts.texts() == [["my a fish, wet"], ["my a shark"]]
    single = given_prompts("a w/o b", ())
    assert single is not None
    assert single.names == ("a w/o b",)


def test_a_list_of_prompts_in_a_config_gives_a_class_each(tmp_path: Path) -> None:
    model, config, folder = stored(tmp_path / "clip", VIT), tmp_path / "c.toml", shards(tmp_path, {0: "a"})
    common = ["extract", str(folder), "--model", model, "--method", "grad-cam", "--device", "cpu", "--target", "top1"]
    common += ["--config", str(config), "--out", str(tmp_path / "run")]
    config.write_text('prompts = ["a fish", "a shark"]')
    ended = call(*common)
    assert ended.returncode == 0, ended.stderr
    assert load_run_folder(str(tmp_path / "run"))[1].class_names == ["a fish", "a shark"]
    config.write_text('prompts = ["a fish, wet", "a shark"]')
    ended = call(*common)
    assert ended.returncode == 2
    assert "a text with a comma cannot be in this list" in ended.stderr


def test_a_name_of_two_classes_is_said_and_is_no_target(tmp_path: Path) -> None:
    found, _ = expand([str(shards(tmp_path, {0: "crane", 1: "dog", 2: "crane"}))])
    prompts, hints = prompts_of_dataset(found, (), "open_clip:x")
    assert "several classes have the name 'crane'" in hints[-1]
    for name in ("crane", "Crane"):
        with pytest.raises(UserError, match="the classes 0, 2 have this name; give one as class:0"):
            number_of(name, prompts.names)
    assert number_of("Dog", prompts.names) == 1


def test_a_differing_part_of_the_prompts_is_named(tmp_path: Path) -> None:
    model, folder = stored(tmp_path / "clip", VIT), shards(tmp_path, {0: "a dog", 1: "a cat"})
    given = {"model": model, "prompts": "a dog,a cat", "target": "top1", **HOW}
    assert extract(folder, tmp_path / "run", **given) == 0
    with pytest.raises(UserError, match=r"config: prompts: templates: \['{}'\] there, \['my {}'\] requested\. "):
        extract(folder, tmp_path / "run", **{**given, "templates": ["my {}"]})
    with pytest.raises(UserError, match=r"prompts: names: \['a dog', 'a cat'\] there, \['a dog'\] requested"):
        extract(folder, tmp_path / "run", **{**given, "prompts": ["a dog"]})


def test_prompts_of_other_classes_are_refused_for_the_label_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = stored(tmp_path / "clip", VIT), shards(tmp_path, {0: "tench", 1: "shark"})
    given = {"model": model, "prompts": "fish,lawn", **HOW}
    assert extract(folder, tmp_path / "run", target="top1", **given) == 0
    assert "labels" not in capsys.readouterr().err
    with pytest.raises(UserError, match="leave out --prompts, whose default are the dataset's classes"):
        extract(folder, tmp_path / "label", target="label", **given)


def test_a_class_without_a_prompt_is_named_with_the_ways_to_name_it(tmp_path: Path) -> None:
    model, folder = stored(tmp_path / "clip", VIT), shards(tmp_path, {0: "tench", 7: "shark"}, (0, 4))
    assert extract(folder, tmp_path / "run", model=model, **HOW) == 0
    (_, error) = pq.read_table(tmp_path / "run" / "data" / "s.parquet")["error"].to_pylist()
    assert error.startswith("no prompt is known for class 4; name it in the classes.json")
