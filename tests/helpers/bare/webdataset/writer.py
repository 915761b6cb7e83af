"""Tars of samples."""

import io
import tarfile
from types import TracebackType
from typing import Any


class TarWriter:
    """Writes samples to a tar, one member for each key but `__key__`. All values are bytes."""

    def __init__(self, file: Any, encoder: bool = False, mtime: float = 0) -> None:
        named = {"name": file} if isinstance(file, str) else {"fileobj": file}
        self._tar, self._mtime = tarfile.open(mode="w", **named), mtime  # noqa: SIM115

    def write(self, sample: dict[str, Any]) -> None:
        for ext, data in sample.items():
            if ext != "__key__":
                member = tarfile.TarInfo(f"{sample['__key__']}.{ext}")
                member.size, member.mtime = len(data), self._mtime
                self._tar.addfile(member, io.BytesIO(data))

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
