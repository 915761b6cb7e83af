"""Local files that are visible only when they are complete."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Write a file that is visible only when it is complete. Its folder is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_bytes(content)
    publish(unfinished, path)


def publish(finished: Path, path: Path) -> None:
    """Rename a finished file to `path`, replacing any file there. On return it is safely on the disk."""
    fsync(finished)
    finished.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
