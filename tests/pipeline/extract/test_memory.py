"""The bytes that a processor holds do not grow with the number of large samples, also if all of them fail."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from extracting import extract
from making import HELPERS

IMAGE_BYTES, IMAGES = 2**23, 96  # 768 MiB of images, which are holes in the file


def write_large(path: Path, *, label: bool) -> None:
    """Write a tar of images without pixels; on disk it takes a few kB."""
    with open(path, "wb") as file:
        for number in range(IMAGES):
            if label:
                with tarfile.open(fileobj=(small := io.BytesIO()), mode="w") as tar:
                    info = tarfile.TarInfo(f"{number}.cls")
                    info.size = 1
                    tar.addfile(info, io.BytesIO(b"1"))
                file.write(small.getvalue()[:1024])
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = IMAGE_BYTES
            file.write(info.tobuf())
            file.seek(IMAGE_BYTES, io.SEEK_CUR)
        file.truncate(file.tell() + 1024)


@pytest.mark.slow
@pytest.mark.parametrize("label", [False, True], ids=["no label", "no image"])
def test_large_samples_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: bool) -> None:
    monkeypatch.chdir(HELPERS)
    (tmp_path / "in").mkdir()
    write_large(tmp_path / "in/x.tar", label=label)
    tracemalloc.start()
    try:
        assert extract(tmp_path / "in", tmp_path / "run", {"decode_threads": 2}, batch_size=64) in (0, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**28 + 8 * IMAGE_BYTES
