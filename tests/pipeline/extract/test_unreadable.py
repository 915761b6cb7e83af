"""A shard that cannot be read while a run is planned is one line, and names the shard."""

from pathlib import Path

import pytest
from making import HELPERS, write_shard

from saltern.pipeline.extract.estimate import estimate
from saltern.pipeline.extract.request import ExtractRequest, limited
from saltern.pipeline.shards.expand import expand
from saltern.schemas.errors import UserError


def unreadable(path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a shard that is cut, or for which the reader may not have the permission."""
    write_shard(path, 3)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-9000])
        return

    def denied(*args: object, **more: object) -> None:
        raise PermissionError(13, f"Failed to open local file '{path}'")

    monkeypatch.setattr("saltern.pipeline.shards.samples._tape", denied)  # root may read any file


@pytest.mark.slow
@pytest.mark.parametrize("model", ["", "making:tiny"])
@pytest.mark.parametrize("how", ["cut", "denied"])
def test_plan_and_limit_on_an_unreadable_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, model: str
) -> None:
    monkeypatch.chdir(HELPERS)
    path = tmp_path / "x.tar"
    unreadable(path, how, monkeypatch)
    with pytest.raises(UserError, match=f"a shard cannot be read: .*{path}"):
        estimate(ExtractRequest(shards=[str(path)], model=model, method="grad-cam", layer="body"), "cpu", 1)
    with pytest.raises(UserError, match=f"a shard cannot be read: .*{path}"):
        limited(expand([str(path)])[0], 2)
