"""Dependencies run one way: schemas <- pipeline <- jobs; and only the engine's files know Ray."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {"schemas": set(), "pipeline": {"schemas"}, "jobs": {"schemas", "pipeline"}}
RAY = {
    "pipeline/engine/actors.py",
    "pipeline/training/train_ray.py",
    "pipeline/training/ray_rank.py",
    "pipeline/submit/submission.py",
}
# Rooms of pipeline/, lowest first, and the rooms that each may import. A new arrow is a decision, made here.
_BASE = {"machine", "naming", "device"}
_RUNS = {"storage", "shards", "maps", "runs"}
_MODELS = {"models", "masknet", "methods"}
ROOMS: dict[str, set[str]] = {
    "machine": set(),
    "naming": set(),
    "device": set(),
    "tables": set(),
    "storage": {"machine"},
    "shards": {"storage", "device"},
    "maps": set(),
    "models": _BASE,
    "masknet": {"models", "storage", *_BASE},
    "methods": {"models", "masknet", *_BASE},
    "runs": {"storage", "shards", "maps"},
    "engine": _RUNS | _BASE,
    "extract": {"engine", *_RUNS, *_MODELS, *_BASE},
    "metrics": {"extract", "engine", "tables", *_RUNS, *_MODELS, *_BASE},
    "show": _RUNS,
    "leaderboard": {"metrics", "show", "extract", "engine", "tables", *_RUNS, *_MODELS, *_BASE},
    "layerwise": {"leaderboard", "metrics", "extract", "engine", "tables", *_RUNS, *_MODELS, *_BASE},
    "export": {"engine", *_RUNS, *_BASE},
    "synthesis": {"extract", "show", "engine", *_RUNS, *_MODELS, *_BASE},
    "training": {"extract", "engine", *_RUNS, *_MODELS, *_BASE},
    "casm": {"training", "extract", "metrics", "show", "engine", "tables", *_RUNS, *_MODELS, *_BASE},
    "localizer": {"training", "extract", "metrics", "engine", "tables", *_RUNS, *_MODELS, *_BASE},
    "submit": {"naming", "storage"},
    "bench": {"casm", "training", "extract", "metrics", "engine", "tables", *_RUNS, *_MODELS, *_BASE},
}
HEAVY = ("torch", "ray", "pyarrow", "webdataset", "numpy")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, *, inside: bool) -> Iterator[str]:
    """Return the modules that a file imports at its top and, with `inside`, in its functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from saltern.pipeline import machine` has its room among the imported names.
            bare = node.module in ("saltern", "saltern.pipeline")
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if bare else (node.module or "",)


@pytest.mark.parametrize("package", BELOW)
def test_no_import_goes_up(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        for module in imported(path, inside=True):
            top, _, rest = module.partition(".")
            assert top not in {*BELOW, "tests", "deploy"}, f"{path} imports {module} past the package `saltern`"
            if top == "saltern":
                assert rest.split(".")[0] in {package, "__version__"} | BELOW[package], f"{path} imports {module}"


def room(module: str) -> str:
    """Return the room of a module: `saltern.pipeline.runs.reader` -> runs."""
    return module.split(".")[2]


def test_every_room_is_in_the_plan() -> None:
    folder = ROOT / "pipeline"
    there = {path.stem for path in folder.iterdir() if path.stem != "__init__" and path.suffix in ("", ".py")}
    assert there - {"__pycache__"} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_those_below_it(name: str) -> None:
    below = list(ROOMS)[: list(ROOMS).index(name)]
    assert ROOMS[name] <= set(below), "the table itself goes up"
    folder = ROOT / "pipeline" / name
    for path in sources(f"pipeline/{name}") if folder.is_dir() else [folder.with_suffix(".py")]:
        for module in imported(path, inside=True):
            if module.startswith("saltern.pipeline."):
                assert room(module) in {name, *ROOMS[name]}, f"{path} imports {module}"


def test_schemas_need_pyarrow_and_the_standard_library_alone() -> None:
    for path in sources("schemas"):
        for module in imported(path, inside=True):
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names | {"pyarrow", "saltern"}, f"{path} imports {module}"


def test_only_the_engines_files_know_ray() -> None:
    for package in BELOW:
        for path in sources(package):
            name = path.relative_to(ROOT).as_posix()
            tops = {module.split(".")[0] for module in imported(path, inside=True)}
            assert "ray" not in tops or name in RAY, f"{path} imports ray"


def test_jobs_import_nothing_heavy_at_the_top() -> None:
    for path in sources("jobs"):
        for module in imported(path, inside=False):
            assert module.split(".")[0] not in HEAVY, f"{path} imports {module} before it is needed"


@pytest.mark.slow
def test_methods_and_classifiers_run_without_ray() -> None:
    bare = "pyarrow", "webdataset", "typer"  # what a machine for measurements may lack, besides Ray
    code = (
        f"import sys; sys.modules.update(dict.fromkeys(('ray', *{bare})))\n"
        "import saltern.pipeline.models.classifiers, saltern.pipeline.bench.methods, saltern.pipeline.bench.casm\n"
        f"for name in {bare}: del sys.modules[name]\n"
        "import saltern.pipeline.extract.processor"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from saltern.jobs.main import app\n"
        "with contextlib.suppress(SystemExit): app(['--help'])\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_files_stay_small() -> None:
    for package in BELOW:
        for path in sources(package):
            assert len(path.read_text().splitlines()) <= 350, f"{path} is past 350 lines"
