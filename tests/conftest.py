"""Fixtures that several test files share."""

import gc
import os
import re
import secrets
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mutate import Fuzz

# A background job of a shell ignores Ctrl-C, and the runs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Test processes run side by side, and torch's threads would compete for the cores. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The compiler would start processes that import torch, for a few small functions.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Ray reads these when it is imported, by whichever test is the first.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
# Niced workers would get no core while other tests run. Ray Train sees the end of a worker at its next health check.
os.environ.update(RAY_worker_niceness="0", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
# On a machine whose cores are busy, a cluster starts slowly. Workers that wait for actors would be started in vain.
os.environ.update(RAY_raylet_start_wait_time_s="120", RAY_worker_register_timeout_seconds="300")
os.environ.update(RAY_prestart_worker_first_driver="0")
for _name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(_name, None)


# Fixtures of tests that take seconds each: a Ray cluster, two ranks, whole networks, photographs.
SLOW = {"ray_address", "in_ranks", "network", "shared_data", "fuzz"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files whose tests are all slow if slow tests are: importing other libraries takes seconds."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text() or None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Collect no garbage meanwhile: nearly all of a million new objects stay, and each collection visits them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use these fixtures as slow. Files with slow tests come first, so that none ends a run."""
    for item in items:
        if not SLOW.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not shares(item.nodeid), item.path not in slow))


def shares(nodeid: str) -> bool:
    """Return whether the file of a test uses fixtures whose processes serve a session: a Ray cluster, or ranks."""
    return _shares(nodeid.partition("::")[0])


@cache
def _shares(file: str) -> bool:
    text = (Path(__file__).parents[1] / file).read_text()
    return bool(re.search(r"\b(ray_address|forking|in_ranks)\b", text))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Send all files that share such processes to one test process, so that each is started once."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "shared" if shares(nodeid) else super()._split_scope(nodeid)

    return Files(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """Spare what the imports have left: each collection would visit these million objects."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=3.0, help="seconds of mutated inputs in each fuzz test")
    parser.addoption("--kills", type=int, default=20, help="runs that the kill campaign kills")


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Return a stream of mutations, seeded by the test's name and limited by --fuzz-seconds."""
    return Fuzz(request.config.getoption("--fuzz-seconds"), zlib.crc32(request.node.name.encode()))


DEVIATIONS: dict[tuple[str, str], float] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Collect the deviations of maps from references. Under `-n`, test processes send them to the reporting one."""
    seen: dict[tuple[str, str], float] = getattr(sys.modules.get("references"), "SEEN", {})
    DEVIATIONS.update(seen)
    output = getattr(session.config, "workeroutput", {})
    output["deviations"] = [[*names, value] for names, value in seen.items()]
    gc.unfreeze()  # what is left at the end of the process would be reported as leaked


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for reference, model, value in getattr(node, "workeroutput", {}).get("deviations", ()):
        DEVIATIONS[reference, model] = max(DEVIATIONS.get((reference, model), 0.0), value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every method's largest deviation from each reference, as a share of the map's largest value."""
    if DEVIATIONS:
        terminalreporter.section("largest deviations from references")
        for (reference, model), deviation in sorted(DEVIATIONS.items()):
            terminalreporter.write_line(f"{deviation:.1e}  {reference}  {model}")


@pytest.fixture(scope="session", autouse=True)
def spared_disk() -> Iterator[None]:
    """Let this process not wait for the disk, as no test cuts the power. Processes that tests start do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real photographs next to the checkout, or skip the test."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the development photographs in ../shared/data, which are not next to this checkout")
    return folder


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Start one cluster for all tests of this process: two CPUs, its own token, nothing written in the user's home."""
    import ray
    from forked_workers import few_processes, forked_workers

    # Ray's Unix sockets are in this folder, and their paths may have 107 characters.
    temporary = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    with temporary as folder, forked_workers(Path(folder)):
        with few_processes():
            context = ray.init(
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=80_000_000,
                _temp_dir=folder,
            )
        yield context.address_info["address"]
        ray.shutdown()
