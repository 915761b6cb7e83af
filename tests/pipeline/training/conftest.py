"""Fixtures of the tests of trainings."""

from pathlib import Path

import casm_toys
import pytest


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return casm_toys.write_shards(tmp_path_factory.mktemp("training") / "shards")
