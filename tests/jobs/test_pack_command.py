"""`saltern pack` as a user calls it."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from saltern.jobs.pack import pack

app = typer.Typer()
app.command()(pack)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a/1.jpg", "a/2.jpg", "b/3.png", "b/notes.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    return tmp_path / "images"


def test_one_line_on_stdout_and_the_next_step_on_stderr(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "the shards"
    ended = CliRunner().invoke(app, [str(images), "--out", str(out), "--per-shard", "2"])
    assert ended.exit_code == 0
    assert ended.stdout == f"3 images of 2 classes, 20.5 kB, in 2 shards in {out}\n"
    skipped, following = ended.stderr.splitlines()
    assert skipped == "1 file (the first is b/notes.txt): skipped, as the name does not end as that of an image"
    assert following.startswith(f"next: saltern extract '{out}' --out RUN")
    assert sorted(path.name for path in out.iterdir()) == [
        "classes.json",
        "shard-000000.tar",
        "shard-000001.tar",
    ]


def test_images_without_an_annotation_are_counted(images: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes").mkdir()
    size = "<size><width>4</width><height>3</height></size>"
    (tmp_path / "boxes" / "1.xml").write_text(f"<annotation>{size}</annotation>")
    ended = CliRunner().invoke(app, [str(images), "--out", str(tmp_path / "out"), "--boxes", str(tmp_path / "boxes")])
    assert ended.exit_code == 0
    assert "1 with boxes, 2 without an annotation" in ended.stdout
