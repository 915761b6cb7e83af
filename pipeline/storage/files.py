"""Local files that appear whole under their name, or not at all."""

import os
from pathlib import Path


def publish(made: Path, path: Path) -> None:
    """Give a finished file its name, in place of what stands there; it is on the disk when this returns."""
    fsync(made)
    made.replace(path)
    fsync(path.parent)


def write(path: Path, content: bytes) -> None:
    """Under its name stands the whole content, or what stood there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".unfinished-{path.name}")
    made.write_bytes(content)
    publish(made, path)


def fsync(path: Path) -> None:
    """What the file or folder holds is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
