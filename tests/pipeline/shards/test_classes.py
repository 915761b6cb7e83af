"""The classes of a dataset are matched with a model's by name."""

import json
from pathlib import Path

import pytest
from making import picture, write_tar

from saltern.pipeline.shards.classes import Match, imagenet_names, match, names_of, parse_names
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.errors import UserError

MODEL = ["tench", "tabby cat", "golden retriever", "crane", "crane"]


def test_a_byte_order_mark_is_no_part_of_a_name() -> None:
    assert parse_names(b"\xef\xbb\xbfcat\ndog\n", "names.txt") == {0: "cat", 1: "dog"}
    assert parse_names(b'\xef\xbb\xbf["cat", "dog"]', "names.json") == {0: "cat", 1: "dog"}


def shard(folder: Path, *names: str) -> Path:
    """Write a shard with a sample for each class name, numbered from 0."""
    samples = [
        (f"{name}/1", {"jpg": picture(0), "cls": str(number), "json": json.dumps({"name": name})})
        for number, name in enumerate(names)
    ]
    return write_tar(folder / "s.tar", samples)


def test_names_are_compared_without_case_and_separators() -> None:
    names = {0: "Tench, Tinca tinca", 1: "tabby-cat", 2: "GOLDEN_retriever"}
    assert match(names, MODEL) == Match(same=[0, 1, 2])


def test_classes_at_another_number_and_unknown_ones_are_told_apart() -> None:
    found = match({0: "golden retriever", 1: "my dog", 2: "tench", 4: "crane"}, MODEL)
    assert found == Match(same=[4], moved={0: 2, 2: 0}, unknown=[1])
    assert found.numbers == {4: 4, 0: 2, 2: 0}


def test_a_name_of_two_classes_is_unknown_unless_its_number_is_one_of_them() -> None:
    assert match({3: "crane", 0: "crane"}, MODEL) == Match(same=[3], unknown=[0])


@pytest.mark.slow  # imports torchvision
def test_imagenet_is_known_by_wordnet_id_and_by_every_library_s_name() -> None:
    from torchvision.models import EfficientNet_B0_Weights

    names = imagenet_names()
    wnids = {0: "n01440764", 1: "n15075141_toilet_tissue", 2: "toilet tissue"}
    assert match(wnids, names) == Match(same=[0], moved={1: 999, 2: 999})
    assert match(dict(enumerate(EfficientNet_B0_Weights.DEFAULT.meta["categories"])), names).same == list(range(1000))


def test_the_photographs_of_imagenet_agree(shared_data: Path) -> None:
    listed = json.loads((shared_data / "imagenet_classes.json").read_text())
    by_name = match({entry["index"]: entry["name"] for entry in listed}, imagenet_names())
    assert len(by_name.same) == 998  # two cranes and two maillots have one name there
    assert by_name.agrees
    assert match({entry["index"]: entry["wnid"] for entry in listed}, imagenet_names()).same == list(range(1000))
    for folder in ("imagenet-sample", "tiny-imagenet"):
        names, complete = names_of(expand([str(shared_data / folder)])[0])
        assert not complete
        assert len(names) > 30
        assert match(names, imagenet_names()).agrees


@pytest.mark.parametrize(
    ("same", "moved", "unknown", "agrees"), [(5, 0, 5, True), (4, 0, 5, False), (10, 1, 0, True), (8, 2, 0, False)]
)
def test_half_of_the_names_suffice_and_few_may_be_moved(same: int, moved: int, unknown: int, agrees: bool) -> None:
    found = Match(list(range(same)), {100 + number: number for number in range(moved)}, list(range(unknown)))
    assert found.agrees == agrees


def test_classes_json_comes_before_the_samples(tmp_path: Path) -> None:
    path = shard(tmp_path, "a", "b")
    shards, _ = expand([str(path)])
    assert names_of(shards) == ({0: "a", 1: "b"}, False)
    (tmp_path / "classes.json").write_text('{"0": "a", "1": "b", "2": "empty"}')
    assert names_of(shards) == ({0: "a", 1: "b", 2: "empty"}, True)


def test_two_folders_that_number_the_classes_differently_are_refused(tmp_path: Path) -> None:
    for folder, names in (("train", ["cat", "dog"]), ("val", ["dog"])):
        shard(tmp_path / folder, *names)
        (tmp_path / folder / "classes.json").write_text(json.dumps(dict(enumerate(names))))
    with pytest.raises(UserError, match=r"class 0 is 'cat' in .*train.* and 'dog' in .*val.*pack --classes"):
        names_of(expand([str(tmp_path)])[0])


def test_shards_that_cannot_be_read_have_no_names(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"no tar" * 200)
    assert names_of(expand([str(tmp_path)])[0]) == ({}, False)


@pytest.mark.parametrize(
    "raw",
    [b'{"0": "cat", "2": "dog"}', b'["cat", null, "dog"]', b"cat\n\ndog\n", b' ["cat", "", "dog"]', b"cat\r\n\r\ndog"],
)
def test_files_of_names_have_three_forms(raw: bytes) -> None:
    assert parse_names(raw, "f") == {0: "cat", 2: "dog"}


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'["a", 1]', b'{"x": "a"}', b'{"-1": "a"}', b"[", b"[" * 9999, b"\xff"]
)
def test_other_files_are_refused_in_one_line(raw: bytes) -> None:
    with pytest.raises(UserError, match="f holds no class names: give JSON"):
        parse_names(raw, "f")


def test_numbers_replace_the_labels_of_samples(tmp_path: Path) -> None:
    shards, _ = expand([str(shard(tmp_path, "a", "b"))])
    assert [(sample.given, sample.label) for sample in read_samples(shards[0], {1: 7})] == [(0, None), (1, 7)]
    assert [(sample.given, sample.label) for sample in read_samples(shards[0])] == [(0, 0), (1, 1)]
