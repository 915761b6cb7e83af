"""Fixtures that several test files share."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ray reads these when it is imported, by whichever test is the first.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
for _name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs beside the checkout; tests that need it skip where it is not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the development photographs in ../shared/data, which are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One cluster for the whole run: two CPUs, a token of its own, nothing written in the user's home."""
    import ray

    # Unix sockets lie below it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
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
