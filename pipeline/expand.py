"""SHARDS as the user writes them -> the list of wanted shards, each with its name, URL and size."""

import glob
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand
from pyarrow import fs

from pipeline.shards import filesystem
from schemas.errors import UserError
from schemas.run import Shard

ENDINGS = (".tar", ".tar.gz", ".tgz")
FLAT = 10_000  # files that one folder may hold
BUCKET = 1_000  # files in each sub-folder beyond that, about


def expand(patterns: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """The shards that the patterns name, in their order (sorted within a glob or folder), each once.

    Args:
        patterns: local paths, s3:// and gs:// URLs, with braces and globs; folders; @FILE with one pattern a line.

    Returns:
        Shards; hints in words on what the user may not have meant.

    Raises:
        UserError: a pattern that matches nothing, a missing shard, a bad scheme, two shards with one name.
    """
    wanted = [(pattern, url) for pattern in _listed(patterns) for url in _braces(pattern)]
    try:
        sizes, repeats = _sizes(wanted)
        hints = _sibling_hint(next(iter(sizes))) if len(patterns) == len(sizes) == 1 else []
    except (OSError, UnicodeError) as error:
        raise UserError(f"the shards cannot be listed: {error}") from error
    if repeats:
        hints.append(f"{len(repeats)} shards are named more than once and taken once, such as {repeats[0]}")
    names = _names(list(sizes))
    return [Shard(name, url, size) for name, (url, size) in zip(names, sizes.items(), strict=True)], hints
