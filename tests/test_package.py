"""The wheel, installed in a folder that holds a user's own `pipeline/`, `jobs/` and `schemas/`."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from making import OWN_NET, picture, write_tar

import saltern

ROOT = Path(__file__).parents[1]
BUILT = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml")
FOLDERS = ("schemas", "pipeline", "jobs", "src")
HOSTILE = ("pandas", "captum", "sitecustomize", "timm", "PIL", "typer")


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command without this process's paths and Ray settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
    ended = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, "COLUMNS": "200", "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0 or not check, ended.stdout + ended.stderr
    return ended


def build(kind: str, source: Path) -> Path:
    """Build a wheel or an sdist. Returns its path."""
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    (source / "dist").mkdir(exist_ok=True)
    return source / "dist" / run(sys.executable, "-c", script, cwd=source).stdout.split()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout without an old build/, which would end up in the wheel."""
    folder = tmp_path_factory.mktemp("source")
    for name in BUILT:
        shutil.copy(ROOT / name, folder)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unwanted)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build("wheel", source)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def environment(folder: Path, *what: str | Path) -> Path:
    """Install into a fresh environment that also sees the packages of this one. Returns its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Setuptools, which builds an editable install, and all that Saltern imports. A line of a .pth file is only a path:
    # the .pth files in it, as that of an editable Saltern, are not read.
    (site / "others.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    run(*pip, "--no-build-isolation", "--ignore-installed", *what, cwd=folder)
    return python


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("wheel") / "venv", wheel)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Make a user's folder with packages of Saltern's old names, a model and a shard."""
    for name in ("pipeline", "jobs", "schemas"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the package of the user was imported')\n")
    (tmp_path / "nets.py").write_text(OWN_NET)
    write_tar(tmp_path / "a.tar", [("one", {"jpg": picture(0)})])
    return tmp_path


@pytest.mark.slow
def test_the_wheel_holds_one_package(wheel: Path) -> None:
    inside = names(wheel)
    assert {name.partition("/")[0] for name in inside} == {"saltern", f"saltern-{saltern.__version__}.dist-info"}
    code = {f"saltern/{path.relative_to(ROOT)}" for folder in FOLDERS[:3] for path in (ROOT / folder).rglob("*.py")}
    assert code <= inside
    assert {"saltern/py.typed", "saltern/__main__.py", "saltern/pipeline/show/page.html"} <= inside


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", source)) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert names(build("wheel", unpacked)) == names(wheel)
    assert {"CHANGELOG.md", "CITATION.cff", "constraints.txt"} <= {path.name for path in unpacked.iterdir()}


SCRIPT = (
    "import saltern.jobs.main, saltern.schemas.errors; from saltern.pipeline import naming; "
    "print(saltern.__version__, naming.__file__)"
)


def imported(python: Path, cwd: Path) -> Path:
    """Return the file of a module of the Saltern that a python imports."""
    version, _, file = run(python, "-c", SCRIPT, cwd=cwd).stdout.strip().partition(" ")
    assert version == saltern.__version__
    return Path(file)


@pytest.mark.slow
def test_an_installed_wheel_beside_folders_of_the_old_names(python: Path, mine: Path) -> None:
    assert "extract" in run(python.with_name("saltern"), "--help", cwd=mine).stdout
    assert imported(python, mine).is_relative_to(python.parents[1])


@pytest.mark.slow
def test_an_editable_install_beside_folders_of_the_old_names(source: Path, mine: Path, tmp_path: Path) -> None:
    assert imported(environment(tmp_path / "venv", "--editable", source), mine).is_relative_to(source)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_installed_wheel_extracts_and_runs_no_file_that_the_user_did_not_name(
    python: Path, mine: Path, engine: str
) -> None:
    for name in HOSTILE:
        (mine / f"{name}.py").write_text(f"open({str(mine / 'ran')!r}, 'a').write({name!r})\n")
    words = ["a.tar", "--out", "run", "--model", "nets:small", "--weights", "none", "--method", "grad-cam"]
    shape = ["--layer", "0", "--target", "top1", "--crop", "32", "--resize", "32"]
    where = ["--engine", engine, "--device", "cpu", "--workers", "1"]
    run(python, "-m", "saltern", "extract", *words, *shape, *where, cwd=mine)  # -m puts the folder first in the path
    (receipt,) = (mine / "run" / "receipts").rglob("*.json")
    assert json.loads(receipt.read_text())["statuses"] == {"ok": 1}
    assert not (mine / "ran").exists()


def test_importing_saltern_loads_nothing_heavy() -> None:
    script = (
        "import sys, saltern; dir(saltern), saltern.__version__\n"
        "print([name for name in ('torch', 'ray', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_every_public_name_resolves() -> None:
    assert {name for name in dir(saltern) if getattr(saltern, name) is not None} == set(saltern.__all__)
    with pytest.raises(AttributeError, match="no attribute 'openrun'"):
        _ = saltern.openrun
