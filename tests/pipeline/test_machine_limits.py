"""Cores and memory are those of the machine that computes: control groups, and the workers beside this one."""

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saltern.pipeline import machine
from saltern.pipeline.engine import conduct

ray = pytest.importorskip("ray")
from saltern.pipeline.engine import actors  # noqa: E402

GB = 2**30
Groups = Callable[..., None]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    machine.share(1)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Return a function that makes the files of control groups on a machine of 64 cores."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)

    def write(own: str, **files: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    return write


@pytest.mark.parametrize(
    ("own", "files", "count"),
    [
        ("0::/", {}, 64),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "800000 100000"}, 8),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "9900000 100000"}, 64),
        ("0::/pod/box", {"pod/cpu.max": "400000 100000", "pod/box/cpu.max": "max 100000"}, 4),
        ("0::/pod/box", {"pod/cpu.max": "max 100000", "pod/box/cpu.max": "300000 100000"}, 3),
        ("0::/../elsewhere", {"cpu.max": "500000 100000"}, 5),
        (
            "4:cpu,cpuacct:/box\n0::/",
            {"cpu/box/cpu.cfs_quota_us": "600000", "cpu/box/cpu.cfs_period_us": "100000"},
            6,
        ),
        ("4:cpu:/not/here", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("what is this", {"cpu.max": "?"}, 64),
    ],
)
def test_cores_are_bounded_by_quotas(groups: Groups, own: str, files: dict[str, str], count: int) -> None:
    groups(own, **files)
    assert machine.cores() == count
    assert machine.decode_threads() == min(16, count)


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        ("0::/", {"memory.max": f"{GB}", "memory.current": f"{GB // 4}"}, 3 * GB // 4),
        ("0::/", {"memory.max": f"{GB}", "memory.current": f"{2 * GB}"}, 0),
        (
            "0::/",
            {"memory.max": f"{GB}", "memory.current": f"{GB}", "memory.stat": f"anon 5\ninactive_file {GB // 2}"},
            GB // 2,
        ),
        ("0::/pod/box", {"pod/memory.max": f"{GB}", "pod/memory.current": "0", "pod/box/memory.max": "max"}, GB),
        (
            "9:memory:/box",
            {
                "memory/box/memory.limit_in_bytes": f"{GB}",
                "memory/box/memory.usage_in_bytes": f"{GB // 2}",
                "memory/box/memory.stat": f"inactive_file 0\ntotal_inactive_file {GB // 4}",
                "memory/memory.limit_in_bytes": f"{2**63 - 4096}",
                "memory/memory.usage_in_bytes": f"{GB}",
            },
            3 * GB // 4,
        ),
    ],
)
def test_memory_is_bounded_by_groups(groups: Groups, own: str, files: dict[str, str], free: int) -> None:
    groups(own, **files)
    assert machine.available_memory() == free


@pytest.mark.parametrize(("workers", "kept"), [(1, GB // 4), (2, GB // 8), (1000, 2**26)])
def test_memory_that_is_kept_is_a_part_of_what_the_group_has(
    groups: Groups, workers: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups("0::/", **{"memory.max": f"{GB}", "memory.current": "0"})
    calls: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=calls.__setitem__))
    machine.share(workers)
    machine.keep_memory()
    assert calls[-1] == kept


def test_workers_of_a_machine_share_its_cores(groups: Groups) -> None:
    groups("0::/", **{"cpu.max": "2400000 100000"})
    for workers, threads in ((1, 16), (2, 12), (5, 4), (100, 1)):
        machine.share(workers)
        assert machine.decode_threads() == threads


# A worker on another machine than the driver's


def built_on(node: dict[str, float], requested: int, each: float, workers: int, patch: pytest.MonkeyPatch) -> int:
    """Return the decode threads of a worker that an actor builds on a node."""
    patch.setattr(actors, "_alive", lambda: {"driver": {"CPU": 32.0}, "other": node})
    context = SimpleNamespace(get_node_id=lambda: "other")
    patch.setattr(actors.ray, "get_runtime_context", lambda: context)
    patch.setattr(machine, "keep_memory", lambda: None)  # it would change the allocator of all tests
    worker = actors._Worker()
    resource = "GPU" if "GPU" in node else "CPU"
    factory: Any = partial(conduct._build, lambda spec: spec, spec_of(requested))
    assert worker.build(factory, resource, each, workers) == "other"
    return int(worker._processor.decode_threads)  # type: ignore[attr-defined]


def spec_of(requested: int) -> Any:
    return conduct.Spec(run=None, root="", scratch="", device="cuda", decode_threads=requested)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node", "requested", "each", "workers", "threads"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, 0, 1.0, 64, 8),  # 64 workers, driven from a machine of 32 cores
        ({"CPU": 64.0, "GPU": 8.0}, 0, 1.0, 2, 16),  # both may be on this node
        ({"CPU": 64.0, "GPU": 4.0}, 0, 0.25, 16, 4),
        ({"CPU": 64.0, "GPU": 8.0}, 5, 1.0, 64, 5),
        ({"CPU": 64.0}, 0, 4.0, 100, 4),
        ({}, 0, 1.0, 1, 16),
    ],
)
def test_a_worker_has_its_share_of_its_own_node(
    groups: Groups,
    node: dict[str, float],
    requested: int,
    each: float,
    workers: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups("0::/")
    assert built_on(node, requested, each, workers, monkeypatch) == threads


def test_a_worker_in_a_small_container_has_few_threads(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    groups("0::/", **{"cpu.max": "600000 100000"})
    assert built_on({"CPU": 64.0, "GPU": 2.0}, 0, 1.0, 2, monkeypatch) == 3


@pytest.mark.parametrize(
    ("nodes", "gpus", "requested", "workers", "cpus"),
    [
        ([{"CPU": 64.0, "GPU": 8.0}], 1.0, None, 64, 8),
        ([{"CPU": 64.0, "GPU": 8.0}], 1.0, None, 1, 16),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0}], 1.0, None, 12, 2),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], 1.0, 6, 12, 6),
        ([{"CPU": 2.0, "GPU": 1.0}], 0.25, None, 4, 1),
        ([{"CPU": 4.0, "GPU": 1.0}], 1.0, 12, 1, 4),
        ([], 1.0, None, 1, 1),
    ],
)
def test_actors_request_cores_that_their_nodes_have(
    nodes: list[dict[str, float]],
    gpus: float,
    requested: int | None,
    workers: int,
    cpus: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(actors, "_alive", lambda: {str(number): node for number, node in enumerate(nodes)})
    monkeypatch.setattr(
        actors.ray, "remote", lambda kind: SimpleNamespace(options=lambda **options: asked.update(options))
    )
    actors.RayPool(lambda: None, gpus=gpus, cpus=requested, torch_threads=1, workers=workers)  # type: ignore[arg-type, return-value]
    assert asked["num_cpus"] == cpus
