"""Stage the files that travel with a submitted job."""

import os
import shlex
from pathlib import Path

import pytest

from saltern import __version__
from saltern.pipeline.submit.staging import Submission, Word, stage
from saltern.schemas.errors import UserError

OURS = {"saltern"}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Return the user's folder, full of files that must not travel."""
    folder = tmp_path / "here"
    for name in ("data/big.tar", ".git/config", "tests/test_x.py", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def sent(tmp_path: Path, here: Path, *words: Word, command: str = "extract") -> tuple[Submission, Path]:
    folder = tmp_path / "staged"
    while folder.exists():
        folder = folder.with_name(folder.name + "+")
    folder.mkdir()
    return stage(command, words, folder, here), folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_our_packages_travel(tmp_path: Path, here: Path) -> None:
    _, folder = sent(tmp_path, here)
    assert {path.name for path in folder.iterdir()} == OURS
    found = names(folder)
    assert {
        f"saltern/{name}" for name in ("schemas/run.py", "pipeline/submit/staging.py", "jobs/submit.py", "__main__.py")
    } <= found
    assert not [name for name in found if "__pycache__" in name or name.endswith(".pyc") or "/." in name]
    assert not [name for name in found if "tests" in Path(name).parts]
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 2_000_000


@pytest.mark.parametrize(("name", "flag"), [("shards", None), ("out", "--out"), ("val", "--val")])
def test_credentials_do_not_travel(tmp_path: Path, here: Path, name: str, flag: str | None) -> None:
    with pytest.raises(UserError, match="credentials come from the environment") as refused:
        sent(tmp_path, here, Word(name, flag, "s3://AKIA:SECRET@bucket/x"))
    assert "SECRET" not in str(refused.value)


def test_the_version_that_travels(tmp_path: Path, here: Path) -> None:
    """The job reads it from the code that travels, whatever is installed there."""
    _, folder = sent(tmp_path, here)
    assert f'__version__ = "{__version__}"' in (folder / "saltern" / "__init__.py").read_text()


def test_relative_paths_become_absolute_and_urls_stay(tmp_path: Path, here: Path) -> None:
    (here / "w.pth").write_bytes(b"x")
    job, _ = sent(
        tmp_path,
        here,
        Word("shards", None, "data/{0..3}.tar"),
        Word("shards", None, "s3://bucket/a.tar"),
        Word("shards", None, "/abs/b.tar"),
        Word("out", "--out", "../run"),
        Word("weights", "--weights", "w.pth"),
        Word("method", "--method", "grad-cam"),
        Word("save_map", "--no-map", None),
    )
    run, weights = os.path.normpath(here / "../run"), str(here / "w.pth")
    assert job.args == [
        *(f"{here}/data/{{0..3}}.tar", "s3://bucket/a.tar", "/abs/b.tar"),
        *(f"--out={run}", f"--weights={weights}", "--method=grad-cam", "--no-map"),
    ]
    assert job.out == run
    assert job.absolute == [f"{here}/data/{{0..3}}.tar", run, weights]


def test_further_classifiers_travel_as_models_and_weights_do(tmp_path: Path, here: Path) -> None:
    (here / "vit").mkdir()
    (here / "own.py").write_text("")
    (here / "w.pth").write_bytes(b"x")
    given = "resnet50, hf:vit,own:net=w.pth,timm:a=none,hf:org/name"
    job, folder = sent(tmp_path, here, Word("classifiers", "--classifiers", given), command="evaluate")
    translated = f"resnet50,hf:{here}/vit,own:net={here}/w.pth,timm:a=none,hf:org/name"
    assert job.args == [f"--classifiers={translated}"]
    assert job.absolute == [f"hf:{here}/vit", f"{here}/w.pth"]
    assert (folder / "own.py").exists()


def test_what_a_training_names(tmp_path: Path, here: Path) -> None:
    (here / "classes.txt").write_text("1 2 3")
    words = [
        Word(name, f"--{name}", value)
        for name, value in (
            ("val", "data/v.tar"),
            ("checkpoint", "casm"),
            ("classes", "4,5"),
            ("classes", "classes.txt"),
        )
    ]
    job, folder = sent(tmp_path, here, *words, command="train-casm")
    assert job.args == [
        *(f"--val={here}/data/v.tar", f"--checkpoint={here}/casm"),
        *("--classes=4,5", "--classes=_inputs/0-classes.txt"),
    ]
    assert (folder / "_inputs/0-classes.txt").read_text() == "1 2 3"


def test_files_of_prompts_travel_and_texts_stay(tmp_path: Path, here: Path) -> None:
    (here / "p.txt").write_text("a dog")
    given = (("prompts", "a dog,a cat"), ("prompts", "p.txt"), ("templates", "a {}"), ("templates", "p.txt"))
    job, folder = sent(tmp_path, here, *(Word(name, f"--{name}", value) for name, value in given))
    files = ("_inputs/0-p.txt", "_inputs/1-p.txt")
    assert job.args == ["--prompts=a dog,a cat", f"--prompts={files[0]}", "--templates=a {}", f"--templates={files[1]}"]
    assert (folder / files[1]).read_text() == "a dog"


@pytest.mark.parametrize("value", ["DEFAULT", "none", "IMAGENET1K_V2"])
def test_names_of_weights_stay(tmp_path: Path, here: Path, value: str) -> None:
    assert sent(tmp_path, here, Word("weights", "--weights", value))[0].args == [f"--weights={value}"]


@pytest.mark.parametrize("prefix", ["hf:", "open_clip:local-dir:"])
def test_a_folder_in_the_name_of_a_model_becomes_absolute(tmp_path: Path, here: Path, prefix: str) -> None:
    (here / "hfm" / "ok").mkdir(parents=True)
    job, _ = sent(tmp_path, here, Word("model", "--model", f"{prefix}hfm/ok"))
    assert job.args == [f"--model={prefix}{here / 'hfm' / 'ok'}"]
    assert job.absolute == [f"{prefix}{here / 'hfm' / 'ok'}"]
    job, _ = sent(tmp_path, here, Word("model", "--model", f"{prefix}org/name"))
    assert (job.args, job.absolute) == ([f"--model={prefix}org/name"], [])


@pytest.mark.parametrize("top", ["timm", "hf", "open_clip", "captum"])
def test_a_folder_named_like_a_prefix_of_models_does_not_travel(tmp_path: Path, here: Path, top: str) -> None:
    (here / top).mkdir()
    (here / top / "large.bin").write_bytes(b"x" * 2_000_000)
    _, folder = sent(tmp_path, here, Word("model", "--model", f"{top}:vit"))
    assert {path.name for path in folder.iterdir()} == OURS


def test_the_entrypoint_survives_a_shell(tmp_path: Path, here: Path) -> None:
    job, _ = sent(tmp_path, here, Word("shards", None, "/a b/$(x)'s.tar"), Word("option", "--option", "-1"))
    assert shlex.split(job.entrypoint) == ["python", "-m", "saltern", "extract", "/a b/$(x)'s.tar", "--option=-1"]
    assert "$(x)" in shlex.split(job.entrypoint)[4]


def test_a_config_travels_as_it_is(tmp_path: Path, here: Path) -> None:
    (here / "c.toml").write_text('model = "resnet18"\nout = "s3://bucket/run"\n')
    job, folder = sent(tmp_path, here, Word("config", "--config", "c.toml"))
    assert (folder / job.args[0].removeprefix("--config=")).read_text() == (here / "c.toml").read_text()


def test_a_config_with_a_relative_path_is_refused(tmp_path: Path, here: Path) -> None:
    (here / "c.toml").write_text('out = "runs/a"\n')
    with pytest.raises(UserError, match="out = 'runs/a' is relative"):
        sent(tmp_path, here, Word("config", "--config", "c.toml"))


def test_a_list_travels_with_absolute_lines(tmp_path: Path, here: Path) -> None:
    (here / "l.txt").write_text("# the first two\ndata/a.tar\n\ns3://bucket/b.tar\n/abs/c.tar\n")
    job, folder = sent(tmp_path, here, Word("shards", None, "@l.txt"))
    assert job.args[0].startswith("@")
    lines = (folder / job.args[0][1:]).read_text().splitlines()
    assert lines == [f"{here}/data/a.tar", "s3://bucket/b.tar", "/abs/c.tar"]


def test_files_of_one_name_keep_apart(tmp_path: Path, here: Path) -> None:
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / "l.txt").write_text(f"/{name}.tar\n")
    job, folder = sent(tmp_path, here, Word("shards", None, "@a/l.txt"), Word("shards", None, "@b/l.txt"))
    assert [(folder / word[1:]).read_text() for word in job.args] == ["/a.tar\n", "/b.tar\n"]


def test_the_users_module_travels(tmp_path: Path, here: Path) -> None:
    (here / "nets.py").write_text("tiny = 1\n")
    package = here / "mine" / "__pycache__"
    package.mkdir(parents=True)
    (package / "x.pyc").write_bytes(b"x")
    (here / "mine" / "cams.py").write_text("Mine = 1\n")
    words = Word("model", "--model", "nets:tiny"), Word("method", "--method", "mine.cams:Mine")
    job, folder = sent(tmp_path, here, *words)
    assert job.args == ["--model=nets:tiny", "--method=mine.cams:Mine"]
    assert {name for name in names(folder) if Path(name).parts[0] not in OURS} == {"nets.py", "mine/cams.py"}


def test_a_module_that_is_not_here_is_left_to_the_cluster(tmp_path: Path, here: Path) -> None:
    words = (
        Word("model", "--model", "timm:vit_tiny"),
        Word("method", "--method", "saltern.pipeline.methods.cams.activation:Cam"),
    )
    _, folder = sent(tmp_path, here, *words)
    assert {path.name for path in folder.iterdir()} == OURS


@pytest.mark.parametrize(
    ("word", "name"),
    [
        (Word("config", "--config", "big.toml"), "big.toml"),
        (Word("shards", None, "@big.toml"), "big.toml"),
        (Word("model", "--model", "big:factory"), "big:factory"),
    ],
)
def test_large_files_are_refused(tmp_path: Path, here: Path, word: Word, name: str) -> None:
    (here / "big.toml").write_bytes(b"#" * 1_000_001)
    (here / "big").mkdir()
    (here / "big" / "weights.bin").write_bytes(b"#" * 1_000_001)
    with pytest.raises(UserError, match=rf"{name} has 1\.0 MB, and at most 1 MB can travel"):
        sent(tmp_path, here, word)


@pytest.mark.parametrize("word", [Word("config", "--config", "no.toml"), Word("shards", None, "@no.toml")])
def test_a_missing_file_is_named(tmp_path: Path, here: Path, word: Word) -> None:
    with pytest.raises(UserError, match=r"no file no\.toml here"):
        sent(tmp_path, here, word)


def test_the_fingerprint_covers_words_and_files(tmp_path: Path, here: Path) -> None:
    def mark(*words: Word, command: str = "extract") -> str:
        return sent(tmp_path, here, *words, command=command)[0].fingerprint

    (here / "c.toml").write_text("batch_size = 1\n")
    (here / "nets.py").write_text("tiny = 1\n")
    words = [Word("config", "--config", "c.toml"), Word("model", "--model", "nets:tiny")]
    first = mark(*words)
    assert len(first) == 16
    assert mark(*words) == first
    assert mark(*words, command="plan") != first
    assert mark(*words, Word("seed", "--seed", "1")) != first
    (here / "nets.py").write_text("tiny = 2\n")
    second = mark(*words)
    assert second != first
    (here / "c.toml").write_text("batch_size = 2\n")
    assert mark(*words) not in (first, second)
