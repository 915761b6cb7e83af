"""One driver owns a run, by a lock or by a claim; a dead one owns nothing."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from s3server import BUCKET, S3, s3_server

from saltern.pipeline.storage import filesystem
from saltern.pipeline.storage import lock as module
from saltern.pipeline.storage.lock import CLAIM, LOCK, own
from saltern.pipeline.storage.session import own_folder
from saltern.pipeline.storage.store import Store
from saltern.pipeline.training.loop import locked as training_lock
from saltern.schemas.errors import OutputError, UserError


def refuse_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(scope="module")  # clients are kept for each bucket
def server() -> Iterator[S3]:
    filesystem._bucket.cache_clear()
    with s3_server() as made:
        yield made
    filesystem._bucket.cache_clear()


@pytest.fixture(params=["lock", "claim", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Return a run's folder with locks, on a file system without them, or in an object store."""
    monkeypatch.setattr(module, "SETTLE_S", 0.3)
    if request.param == "claim":
        monkeypatch.setattr(fcntl, "flock", refuse_locks)
    if request.param != "bucket":
        (tmp_path / "run").mkdir()
        yield Store(str(tmp_path / "run"))
        return
    server = request.getfixturevalue("server")
    for name, value in {
        "ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "ACCESS_KEY_ID": "key",
        "SECRET_ACCESS_KEY": "secret",
        "DEFAULT_REGION": "us-east-1",
        "EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield Store(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def age(request: pytest.FixtureRequest, store: Store) -> Callable[[str], None]:
    """Return a function that makes a file as old as if it had been written ten minutes ago."""
    written = time.time() - 600

    def age(name: str) -> None:
        if store.local:
            os.utime(store.full(name), (written, written))
        else:
            key = store.full(name).removeprefix(f"{BUCKET}/")
            request.getfixturevalue("server").written[key] = datetime.fromtimestamp(int(written), UTC)

    return age


def marks(store: Store) -> list[str]:
    return [name for name in store.listing("", "") if name.startswith((LOCK, CLAIM))]


def test_a_second_owner_is_refused_in_one_line_that_names_the_first(store: Store) -> None:
    with own(store) as held:
        held.check()
        with pytest.raises(UserError) as caught, own(store):
            pass
        held.check()
        assert len(marks(store)) == 1
    said = str(caught.value)
    assert f"process {os.getpid()}, since 2" in said
    assert "\n" not in said
    assert marks(store) == []
    with own(store):
        pass


def test_an_owner_whose_mark_was_taken_away_publishes_no_more(store: Store) -> None:
    with own(store) as held:
        store.remove(marks(store))
        with pytest.raises(OutputError, match="was removed"):
            held.check()
        with own(store):
            with pytest.raises(OutputError, match="was removed"):
                held.check()
            assert len(marks(store)) == 1
        assert marks(store) == []


def test_of_owners_that_start_together_at_most_one_wins(store: Store) -> None:
    barrier, owners, most = threading.Barrier(4), [], []

    def enter() -> None:
        barrier.wait()
        try:
            with own(store):
                owners.append(threading.get_ident())
                most.append(len(owners))
                time.sleep(0.4)
                owners.remove(threading.get_ident())
        except UserError:
            pass

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


@pytest.mark.parametrize("store", ["bucket"], indirect=True)
def test_an_object_that_is_removed_while_it_is_read_does_not_exist(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the mark of an owner that has just ended."""
    real = store.fs

    class Removing:
        def open_input_stream(self, path: str) -> Any:
            stream = real.open_input_stream(path)
            real.delete_file(path)
            return stream

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    store.write("mark", b"x")
    assert store.read("mark") == b"x"
    monkeypatch.setattr(store, "fs", Removing())
    assert store.read("mark") is None


def killed(work: Callable[[], object]) -> None:
    """Kill a process that has done `work`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        work()
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)


def test_a_killed_owner_owns_nothing(store: Store) -> None:
    held = contextlib.ExitStack()
    if store.local:
        killed(lambda: held.enter_context(own(store)))
    else:  # a forked process cannot use connections; another process has the number of this claim's
        store.write(f"{CLAIM}0", json.dumps({**module._me(), "process": [*module._me()["process"][:2], "1"]}).encode())
    assert len(marks(store)) == 1
    with own(store):
        assert len(marks(store)) == 1
    assert marks(store) == []


def claim(store: Store, **changes: object) -> str:
    """Write the claim of a process on another machine."""
    me = {**module._me(), "host": "elsewhere", "process": ["boot", "pid:[1]", "5"], **changes}
    store.write(f"{CLAIM}0", json.dumps(me).encode())
    return f"{CLAIM}0"


def test_a_claim_of_another_machine_holds_until_it_is_stale(
    store: Store, age: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    name = claim(store, pid=7)
    with pytest.raises(UserError, match="host elsewhere, process 7"), own(store):
        pass
    assert marks(store) == [name]
    age(name)
    with own(store):
        assert name not in marks(store)
    assert marks(store) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"pid": "x"}', b"\xff", b"[" * 10**5])
def test_a_claim_that_cannot_be_read_is_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    store = Store(str(tmp_path))
    store.write(f"{CLAIM}0", content)
    with pytest.raises(UserError, match="its process is not known"), own(store):
        pass


def test_an_owner_writes_its_claim_again_and_again(
    store: Store, age: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    with own(store) as held:
        (name,) = marks(store)
        for _ in range(2):
            age(name)
            end = time.monotonic() + 60
            while time.time() - store.fs.get_file_info(store.full(name)).mtime_ns / 1e9 > module.STALE_S:
                assert time.monotonic() < end
                time.sleep(0.02)
        with pytest.raises(UserError, match="another command"), own(store):
            pass
        held.check()


def test_what_is_locked_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS refuses an exclusive lock on a file that is open for reading only (EBADF)."""
    flock, locked = fcntl.flock, []

    def of_nfs(handle: Any, how: int) -> None:
        locked.append(handle)
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with own(Store(str(tmp_path))), training_lock(tmp_path, "driver"):
        own_folder()
        own_folder()  # looks whether the first is owned
    assert len(locked) >= 5


def test_another_error_of_the_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), own(Store(str(tmp_path))):
        pass
