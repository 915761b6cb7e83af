"""URLs of object stores."""

import pytest
from pyarrow import fs
from s3server import BUCKET, used_server

from saltern.pipeline.storage.filesystem import filesystem
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import UserError


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:SECRET@bucket/run",
        "s3://AKIA:SEC/RET@bucket/run",
        "gs://SECRET@bucket/run",
        "https://user:SECRET@host/x.tar",
        "https://host/x.tar?signature=SECRET",
    ],
)
def test_a_refused_url_does_not_repeat_credentials(url: str) -> None:
    with pytest.raises(UserError) as refused:
        filesystem(url)
    assert "SEC" not in str(refused.value)
    assert "s3://" in str(refused.value)


@pytest.mark.parametrize("path", ["a/b", "./s3://a", "C:/a"])
def test_other_text_is_a_local_path(path: str) -> None:
    found, there = filesystem(path)
    assert isinstance(found, fs.LocalFileSystem)
    assert there == path


def test_a_small_file_is_written_by_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with used_server(monkeypatch) as server:
        said: list[str] = []
        server.before = said.append
        Store(f"s3://{BUCKET}/run").write("receipts/a.json", b"{}")
        assert server.objects["run/receipts/a.json"] == b"{}"
        assert [line for line in said if not line.startswith("HEAD")] == ["PUT run/receipts/a.json"]
