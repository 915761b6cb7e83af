"""Build small tars for the tests of code that reads shards."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from saltern.schemas.run import Shard

Members = Sequence[tuple[str, bytes]]


def tar_bytes(members: Members, **options: int) -> bytes:
    """Return a tar as Python writes it: two zero blocks at the end, padded to 10,240 bytes."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def shard_at(path: Path, content: bytes | None = None, take: int | None = None) -> Shard:
    """Return the shard at a path. If content is given, write it first."""
    if content is not None:
        path.write_bytes(content)
    return Shard(path.name, str(path), path.stat().st_size, take)


def samples(count: int, image: bytes = b"image") -> list[tuple[str, bytes]]:
    """Return the members of samples s0, s1, ... whose class is their number."""
    return [(f"s{i}.{ext}", data) for i in range(count) for ext, data in (("jpg", image), ("cls", b"%d" % i))]
