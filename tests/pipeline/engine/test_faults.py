"""After each kind of fault, a run equals an undisturbed one, byte for byte, and no stale file is left."""

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from faults import EACH, SHARDS, actors, command, done, equals, finish, resume, run, run_here, start, until, workers_of
from forked import Forks
from forked_workers import few_processes
from making import files, picture, write_shards, write_tar
from PIL import Image

from saltern.pipeline.engine import driver
from saltern.pipeline.runs.manifest import load_run_folder, read_failures, read_receipts
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("in"), SHARDS, EACH)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("out") / "run"
    resume(shards, out)
    return files(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_actors_write_the_same_bytes(
    shards: Path, undisturbed: dict[str, bytes], tmp_path: Path, ray_address: str, workers: int
) -> None:
    line = command(shards, tmp_path / "run", "--engine", "ray", "--address", ray_address, "--workers", str(workers))
    code, said = run_here(line)
    assert code == 0, said
    equals(tmp_path / "run", undisturbed)
    receipts = read_receipts(*load_run_folder(str(tmp_path / "run"))).values()
    assert len({receipt.worker for receipt in receipts}) == workers


def test_a_killed_actor(shards: Path, undisturbed: dict[str, bytes], tmp_path: Path, ray_address: str) -> None:
    out = tmp_path / "run"

    def kill_one() -> None:
        until(lambda: 1 <= done(out) < SHARDS - 2)
        actors("_Worker")[0].kill()

    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_one)
        code, said = run_here(command(shards, out, "--engine", "ray", "--address", ray_address, "--workers", "2"))
        killed.result()
    assert code == 0, said
    assert "a worker was replaced" in said
    equals(out, undisturbed)


@pytest.mark.parametrize("moment", ["at the start", "after one shard", "late"])
def test_a_killed_driver(
    forks: Forks,
    shards: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    moment: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    running = start(forks, command(shards, out, "--engine", "local"))
    wanted = {"at the start": 0, "after one shard": 1, "late": SHARDS - 2}[moment]
    until(lambda: (out / "run.json").exists() and done(out) >= wanted, running)
    running.kill()
    finish(forks, running)
    assert done(out) < SHARDS
    before = done(out)
    capsys.readouterr()
    assert resume(shards, out).done == SHARDS
    said = capsys.readouterr()
    assert f"{before} of {SHARDS} shards done" in said.err
    assert f"{SHARDS}/{SHARDS} shards done" in said.out
    equals(out, undisturbed)


def test_a_killed_driver_of_actors(
    forks: Forks, shards: Path, undisturbed: dict[str, bytes], tmp_path: Path, ray_address: str
) -> None:
    out = tmp_path / "run"
    line = command(shards, out, "--engine", "ray", "--address", ray_address, "--workers")
    running = start(forks, [*line, "2"])
    until(lambda: done(out) >= 2, running)
    running.kill()
    finish(forks, running)
    code, said = run_here([*line, "1"])
    assert code == 0, said
    equals(out, undisturbed)


def test_a_lost_node_without_replacement(
    forks: Forks, shards: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    # An orphaned actor survives for a moment, in which it must not finish. Actors have their node's environment.
    monkeypatch.setenv("SLOW", "0.5")
    out = tmp_path / "run"
    each = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80_000_000}
    quick = {"_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 2}}
    with few_processes():
        cluster = Cluster(initialize_head=True, head_node_args={**each, **quick, "include_dashboard": False})
    try:
        node = cluster.add_node(**each)
        line = command(shards, out, "--engine", "ray", "--address", cluster.address, "--workers", "2")
        running = start(forks, line)
        until(lambda: workers_of(out) == 2, running)
        cluster.remove_node(node, allow_graceful=False)
        code, said = finish(forks, running)
        assert code == 0, said
        assert "its machine was lost" in said, said
        equals(out, undisturbed)
    finally:
        cluster.shutdown()


def black() -> bytes:
    import io

    stream = io.BytesIO()
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """Write four shards. The third holds a black image, which kills or stops some methods."""
    folder = write_shards(tmp_path / "in", 4, 4)
    write_tar(folder / "part-000002.tar", [("a", {"jpg": picture(1)}), ("b", {"png": black()})])
    return folder


def test_a_poison_shard(spoiled: Path, tmp_path: Path, ray_address: str) -> None:
    out = tmp_path / "run"
    deadly = ("--method", "odd_methods:Deadly", "--target", "top1")
    line = command(spoiled, out, "--engine", "ray", "--address", ray_address, "--workers", "2", method=deadly)
    code, said = run_here(line)
    assert code == 1, said
    store, made = load_run_folder(str(out))
    assert sorted(read_receipts(store, made)) == ["part-000000", "part-000001", "part-000003"]
    (failure,) = read_failures(store, []).values()
    assert (failure.shard, failure.kind, failure.attempts) == ("part-000002", "poison", 3)
    assert "part-000002: poison" in said


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_shard_past_its_time(
    forks: Forks, spoiled: Path, tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr(driver, "BACKOFF_S", (0.1, 0.2))
    out = tmp_path / "run"
    stuck = ("--method", "odd_methods:Stuck", "--target", "top1")
    where = ("--engine", "local") if engine == "local" else ("--engine", "ray", "--address", ray_address)
    line = command(spoiled, out, *where, "--shard-timeout", "2", method=stuck)
    code, said = run(forks, line) if engine == "local" else run_here(line)  # a stuck local engine ends its process
    assert code == 1, said
    store, made = load_run_folder(str(out))
    assert sorted(read_receipts(store, made)) == ["part-000000", "part-000001", "part-000003"]
    assert "part-000002: timeout: not done after --shard-timeout 2 s" in said
    assert not [path.name for path in out.iterdir() if path.name.startswith("_tmp-")]


def test_two_drivers_on_one_folder(forks: Forks, shards: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The second is refused in one line that names the first, also if it would overwrite."""
    out = tmp_path / "run"
    first = start(forks, command(shards, out, "--engine", "local"))
    until(lambda: done(out) >= 1, first)
    first.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    for more in ({}, {"overwrite": True}):
        with pytest.raises(
            UserError, match=rf"another command is writing this run \(host .*, process {first.pid}, since"
        ):
            resume(shards, out, **more)
    first.send_signal(signal.SIGCONT)
    code, said = finish(forks, first)
    assert code == 0, said
    equals(out, undisturbed)


def test_a_limit_on_file_sizes(forks: Forks, shards: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "run"
    # run.json fits, no data file does
    code, said = run(forks, command(shards, out, "--engine", "local"), file_size=7000)
    assert code == 1, said
    assert "cannot write to" in said
    assert "Traceback" not in said
    assert files(out) == {}
    resume(shards, out)
    equals(out, undisturbed)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "saltern-test", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a small disk: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(forks: Forks, shards: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    # A data file takes 36 kB, and two may be on their way at once: room for both, and not for all.
    with small_disk(tmp_path / "disk", "128k") as disk:
        out = disk / "run"
        code, said = run(forks, command(shards, out, "--engine", "local"))
        assert code == 1, said
        assert "No space left on device" in said
        assert "Traceback" not in said
        assert 0 < done(out) < SHARDS
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        resume(shards, out)
        equals(out, undisturbed)


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(
    forks: Forks,
    shards: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    ray_address: str,
    engine: str,
    how: signal.Signals,
) -> None:
    out = tmp_path / "run"
    where = ("local",) if engine == "local" else ("ray", "--address", ray_address, "--workers", "1")
    running = start(forks, command(shards, out, "--engine", *where))
    until(lambda: done(out) >= 1, running)
    running.send_signal(how)
    code, said = finish(forks, running)
    assert code == 130, said
    assert "Traceback" not in said
    again = r"(; \d+ images of unfinished shards will be done again)?"
    assert re.search(f"interrupted; finished shards are kept{again}: repeat the command to resume", said)
    assert not [path.name for path in out.iterdir() if path.name.startswith("_tmp-")]
    assert 1 <= done(out) < SHARDS
    resume(shards, out)
    equals(out, undisturbed)


def test_another_config_is_refused_in_one_line(forks: Forks, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    resume(shards, out, limit=3)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, said = run(forks, command(shards, out, "--engine", "local", "--limit", "3", "--discretize", "otsu"))
    assert code == 2
    assert "discretize: 'mean:1' there, 'otsu' requested" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out)
