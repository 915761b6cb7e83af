"""`--labels`: the dataset's class numbers become the model's, or are refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import call
from extracting import extract
from making import picture, write_tar
from pages import Page

from saltern.pipeline.extract import request
from saltern.pipeline.extract.labels import choose_labels
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.classifiers import Classifier
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.runs.verify import verify
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.pack import pack
from saltern.pipeline.show.sheet import contact_sheet
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard

MODEL = ["cat", "dog", "fox", "owl", "elk"]  # of making:tiny, for these tests


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the network of these tests names of its classes."""

    def load(name: str, weights: str, *, seed: int) -> Classifier:
        loaded = classifiers.load(name, weights, seed=seed)
        loaded.class_names = MODEL
        return loaded

    monkeypatch.setattr(request, "load_classifier", lambda *given: load(*given[:2], seed=given[2]))


def shards(folder: Path, names: Sequence[str], classes: dict[str, str] | None = None) -> Path:
    """Write a shard with a sample for each of the names, numbered from 0, and classes.json."""
    write_tar(
        folder / "shards" / "s.tar",
        ((f"k{number}", {"jpg": picture(number), "cls": str(number)}) for number in range(len(names))),
    )
    listed = dict(enumerate(names)) if classes is None else classes
    (folder / "shards" / "classes.json").write_text(json.dumps(listed))
    return folder / "shards"


def chosen(option: str, folder: Path, *, needed: bool = True, model: Sequence[str] | None = MODEL) -> object:
    found: list[Shard] = expand([str(folder)])[0]
    return choose_labels(option, found, model, 5, needed=needed)


def columns(run: Path) -> list[tuple[int | None, int | None, str]]:
    table = pq.read_table(run / "data" / "s.parquet", columns=["label", "target", "status"])
    return [tuple(row.values()) for row in table.to_pylist()]


def test_names_at_other_numbers_are_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = shards(tmp_path, ["dog", "Owl", "cat"]), tmp_path / "run"
    assert extract(folder, out) == 0
    assert columns(out) == [(1, 1, "ok"), (3, 3, "ok"), (0, 0, "ok")]
    assert "labels: 3 classes got the model's numbers by their names (0 'dog' is 1 'dog'" in capsys.readouterr().err
    store, run = load_run_folder(str(out))
    assert run.config.to_dict()["labels"] == {"0": 1, "1": 3, "2": 0}
    assert verify(store, run).findings == []
    # A resumed run keeps them, and another table is another config.
    assert extract(folder, out) == 0
    with pytest.raises(UserError, match=r"labels: .* there, None requested"):
        extract(folder, out, labels="as-is")
    assert extract(folder, out, {"overwrite": True}, labels="as-is") == 0
    assert [label for label, _, _ in columns(out)] == [0, 1, 2]


def test_numbers_that_are_the_model_s_leave_the_fingerprint_as_it_was(tmp_path: Path) -> None:
    folder = shards(tmp_path, ["cat", "dog", "fox"])
    prints = set()
    for number, option in enumerate(["auto", "as-is"]):
        assert extract(folder, tmp_path / str(number), labels=option) == 0
        run = load_run_folder(str(tmp_path / str(number)))[1]
        assert "labels" not in run.config.to_dict()
        prints.add(run.fingerprint)
    assert len(prints) == 1


def test_names_that_the_model_lacks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder, out = shards(tmp_path, ["my bed", "my desk"]), tmp_path / "run"
    with pytest.raises(UserError) as refused:
        extract(folder, out)
    said = str(refused.value)
    assert "class 0 'my bed', 1 'my desk' in the shards, but the model's class 0 is 'cat'" in said
    assert all(fix in said for fix in ("--target top1", "--labels FILE", "--labels as-is"))
    assert not out.exists()


@pytest.mark.slow
def test_a_packed_folder_of_ones_own_classes_is_refused_and_shown_with_both_tables_of_names(tmp_path: Path) -> None:
    for name in ("my bed", "my desk"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.jpg").write_bytes(picture(len(name)))
    pack(tmp_path / "images", tmp_path / "packed")
    with pytest.raises(UserError, match="class 0 'my bed', 1 'my desk' in the shards"):
        extract(tmp_path / "packed", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert extract(tmp_path / "packed", tmp_path / "run", target="top1") == 0
    run = open_run(str(tmp_path / "run"))
    for card, row in zip(Page(contact_sheet(run)).cards, run, strict=True):
        said = " ".join(card.text.split())
        assert f"label {row.label} my {('bed', 'desk')[row.label]}" in said
        assert f"predicted {row.predicted} {MODEL[row.predicted]}" in said


@pytest.mark.slow
def test_other_targets_and_methods_without_one_need_no_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path, ["my bed", "my desk"])
    assert extract(folder, tmp_path / "run", target="top1") == 0
    assert "labels are kept as they are" in capsys.readouterr().err
    assert extract(folder, tmp_path / "agnostic", method="eigen-cam") == 0


def test_a_file_maps_numbers_and_names(tmp_path: Path) -> None:
    folder, out = shards(tmp_path, ["my bed", "my desk", "my car"]), tmp_path / "run"
    table = tmp_path / "table.json"
    table.write_text('{"0": 4, "My Desk": "fox"}')
    assert extract(folder, out, labels=str(table)) == 0
    assert columns(out) == [(4, 4, "ok"), (2, 2, "ok"), (None, None, "missing_label")]
    errors = pq.read_table(out / "data" / "s.parquet", columns=["error"])["error"].to_pylist()
    assert errors == [None, None, "class 2 is not in the table of --labels"]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ('{"0": 5}', "class 5 is outside of the model's 0..4"),
        ('{"0": "bed"}', "the model has no classes named 'bed'"),
        ('{"chair": 1}', "the dataset has no classes named 'chair'"),
        ('{"0": true}', "True is neither the number nor the name"),
        ('{"0": 1.5}', "1.5 is neither the number nor the name"),
        ("[0, 1]", "give an object from the dataset's classes to the model's"),
        ("{}", "give an object"),
        ("{", "is none of auto, as-is, a JSON file"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, table: str, reason: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(table)
    with pytest.raises(UserError, match=reason):
        chosen(str(path), shards(tmp_path, ["my bed", "my desk"]))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--labels asis is none of auto, as-is, a JSON file"):
        chosen("asis", shards(tmp_path, ["cat"]))


def test_nothing_is_compared_without_names_of_both(tmp_path: Path) -> None:
    folder = shards(tmp_path, ["my bed"])
    assert chosen("auto", folder, model=None) == (None, [])
    (folder / "classes.json").unlink()
    assert chosen("auto", folder) == (None, [])


def test_names_of_some_classes_are_compared_and_not_mapped(tmp_path: Path) -> None:
    samples = [("k", {"jpg": picture(0), "cls": "0", "json": '{"name": "dog"}'})]
    write_tar(tmp_path / "shards" / "s.tar", samples)
    with pytest.raises(UserError, match="saltern pack --classes"):
        chosen("auto", tmp_path / "shards")


@pytest.mark.slow
def test_unrelated_numbers_are_warned_of_at_the_end_and_in_status_verify_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = [picture(number) for number in range(30)], tmp_path / "run"
    tar = tmp_path / "shards" / "s.tar"
    write_tar(tar, ((f"k{number}", {"jpg": image}) for number, image in enumerate(images)))
    assert extract(tar, out, target="top1") == 0
    top1 = pq.read_table(out / "data" / "s.parquet", columns=["predicted"])["predicted"].to_pylist()
    never = ({"jpg": image, "cls": str((label + 1) % 5)} for image, label in zip(images, top1, strict=True))
    write_tar(tar, ((f"k{number}", members) for number, members in enumerate(never)))
    capsys.readouterr()
    assert extract(tar, out, {"overwrite": True}) == 0
    warning = "the labels are the model's top-1 in 0 of 30 samples, which is no better than chance (1 in 5)"
    assert f"WARNING: {warning}" in capsys.readouterr().err
    for command in ("status", "verify"):
        ended = call(command, out)
        assert ended.returncode == 0
        assert f"WARNING: {warning}" in ended.stdout
        assert warning in json.loads(call(command, out, "--json").stdout)["warning"]
    assert warning in Page(contact_sheet(open_run(str(out)))).head
