"""Only CPU time under Python's lock is counted: no work without it, and no waiting."""

import ctypes
import threading
import time
import zlib
from collections.abc import Callable

import pytest

from saltern.pipeline.bench import gil
from saltern.pipeline.bench.gil import Unmeasurable, watched

DATA = bytes(2**20)
ENOUGH_S = 0.3  # CPU time of a thread


def python() -> None:
    sum(range(20_000))


def released() -> None:
    zlib.crc32(DATA)


def run(*works: Callable[[], object]) -> tuple[float, float]:
    """Run each work in a thread for ENOUGH_S of its CPU time. Returns all CPU seconds, and those under the lock."""

    def repeat(work: Callable[[], object]) -> None:
        while time.thread_time() < ENOUGH_S:
            work()

    with watched() as held:
        cpu, before = time.process_time(), held.seconds()
        threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.process_time() - cpu, held.seconds() - before


def test_python_holds_the_lock() -> None:
    cpu, held = run(python)
    assert held > 0.7 * cpu


def test_work_without_the_lock_is_not_counted() -> None:
    cpu, held = run(released)
    assert held < 0.2 * cpu


def test_threads_that_compete_for_the_lock_and_the_cores() -> None:
    cpu, held = run(python, released, released)
    assert held == pytest.approx(ENOUGH_S, rel=0.35)
    assert cpu > 2.5 * ENOUGH_S


def test_a_wait_with_the_lock_is_no_cpu_time() -> None:
    sleep = ctypes.PyDLL(None).usleep  # keeps the lock
    with watched() as held:
        before = held.seconds()
        sleep(200_000)
        assert held.seconds() - before < 0.1


def test_nothing_is_counted_after_the_end() -> None:
    with watched() as held:
        pass
    ended = held.seconds()
    threading.Thread(target=python).start()
    while time.thread_time() < 0.05:
        python()
    assert held.seconds() - ended < 0.01
    assert threading.getprofile() is None


@pytest.mark.parametrize(("compiler", "word"), [("false", "false failed"), (None, "no C compiler")])
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, compiler: str | None, word: str) -> None:
    gil._library.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(Unmeasurable, match=word), watched():
        pass
