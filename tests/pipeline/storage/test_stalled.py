"""A body that stalls in an object store is an error after a bounded time, which the engine retries."""

import threading
import time

import pytest
from s3server import BUCKET, used_server

from saltern.pipeline.storage import filesystem as module


@pytest.mark.slow
def test_a_stalled_body_of_s3_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALLED_S", 1.0)
    monkeypatch.setattr(module, "REQUESTS", 1)
    with used_server(monkeypatch) as server:
        server.objects["x"] = b"a" * 100_000
        store, path = module.filesystem(f"s3://{BUCKET}/x")
        with store.open_input_stream(path) as stream:
            assert len(stream.read()) == 100_000
        server.stalled = threading.Event()
        since = time.monotonic()
        try:
            with pytest.raises(OSError, match=r"too slow|imeout"), store.open_input_stream(path) as stream:
                stream.read()
        finally:
            server.stalled.set()
        assert time.monotonic() - since < 60
    module._bucket.cache_clear()
