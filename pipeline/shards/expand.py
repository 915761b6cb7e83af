"""Expand the user's SHARDS to a list of shards with name, URL and size."""

import errno
import glob
import math
import os
import re
import stat
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand
from pyarrow import fs

from saltern.pipeline.storage.filesystem import filesystem
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard

ENDINGS = (".tar", ".tar.gz", ".tgz")
# Compressed tars that are not read, by ending, with the command that decompresses them.
COMPRESSED = {
    ".tar.bz2": "bzip2 -d", ".tbz2": "bzip2 -d", ".tar.xz": "xz -d", ".txz": "xz -d", ".tar.zst": "zstd -d --rm",
}  # fmt: skip
MAX_SHARDS = 1_000_000  # of one pattern with braces
FLAT = 10_000  # largest number of data files in one folder
BUCKET = 1_000  # approximate number of data files in each sub-folder of a larger one


class File(NamedTuple):
    """A shard in a folder or a bucket."""

    url: str  # or absolute path
    size: int  # bytes
    mtime_ns: int | None
    identity: object  # equal only for one file under two names


def expand(patterns: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """Return the shards that the patterns name, in their order, sorted within a glob or a folder, each once.

    Args:
        patterns: local paths and s3:// or gs:// URLs, with braces and globs; folders; @FILE with one pattern a line.

    Returns:
        The shards, local ones by absolute path; hints for the user about likely mistakes.

    Raises:
        UserError: a pattern that matches nothing, a missing shard, another scheme, two shards with one name.
    """
    wanted = [(pattern, url) for pattern in _listed(patterns) for url in _braces(pattern)]
    hints: list[str] = []
    try:
        files, repeats = _distinct(_find(wanted, hints))
        names = _names([file.url for file in files])
        hints += _sibling_hint(files[0].url) if len(wanted) == len(files) == 1 else []
    except (OSError, ValueError) as error:
        raise UserError(f"the shards cannot be listed: {error}") from error
    if repeats:
        others = f" (and {len(repeats) - 1} others)" if len(repeats) > 1 else ""
        hints.append(f"{repeats[0]}{others} is named more than once, and used once")
    shards = [Shard(name, file.url, file.size, None, file.mtime_ns) for name, file in zip(names, files, strict=True)]
    return shards, hints


def _listed(patterns: Iterable[str]) -> Iterator[str]:
    """Yield the patterns, with those of a @FILE in its place."""
    for pattern in patterns:
        if not pattern.startswith("@"):
            yield pattern
            continue
        try:
            lines = Path(pattern[1:]).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            raise UserError(f"{pattern}: cannot read the list of shards: {error}") from error
        yield from (line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def _braces(pattern: str) -> Iterator[str]:
    """Yield the URLs of a pattern with braces; local ones become absolute."""
    if not pattern:
        raise UserError("an empty string among the shards: is a variable of the shell unset?")
    if "{" not in pattern or os.path.exists(pattern):
        urls = [pattern]
    else:
        # A range is checked before it is expanded, as that takes memory for each number.
        ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}", pattern)
        each = [abs(int(last) - int(first)) // (int(step or 1) or 1) + 1 for first, last, step in ranges]
        try:
            urls = (
                []
                if max(each, default=0) > MAX_SHARDS
                else list(islice(braceexpand(pattern, escape=False), MAX_SHARDS + 1))
            )
        except ValueError as error:
            fix = "write it like 'train-{000000..000123}.tar'"
            raise UserError(f"{pattern}: the braces do not match; {fix}") from error
        if not 0 < len(urls) <= MAX_SHARDS:
            raise UserError(f"{pattern}: the braces name more than {MAX_SHARDS:,} shards; is a number too long?")
    yield from (url.rstrip("/") if _remote(url) else os.path.abspath(url) for url in urls)


def _remote(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def _find(wanted: list[tuple[str, str]], hints: list[str]) -> Iterator[File]:
    """Yield the files of all patterns; add hints. Raise UserError for the first pattern without files."""
    infos = _look_up([url for _, url in wanted if _remote(url)])
    missing = []
    for pattern, url in wanted:
        files = list(_find_remote(url, infos[url], hints) if _remote(url) else _find_local(url, hints))
        yield from files
        if not files:
            missing.append((pattern, url))
    if missing:
        raise _missing(*missing[0], [pattern for pattern, _ in missing], [pattern for pattern, _ in wanted])


def _missing(pattern: str, url: str, missing: list[str], wanted: list[str]) -> UserError:
    ends = f"file that ends in {', '.join(ENDINGS)}"
    if wanted.count(pattern) > 1:
        count = f"{missing.count(pattern)} of its {wanted.count(pattern)} shards"
        return UserError(f"{pattern} lacks {count}, the first is {url}")
    if os.path.isdir(url):
        fix = next(iter(_left_out(_below(url, _above(url), []))), "`saltern pack` makes shards from an image folder")
        return UserError(f"{pattern}: contains no {ends}; {fix}")
    if glob.has_magic(url):
        return UserError(f"{pattern}: matches no {ends}")
    return UserError(f"{pattern}: no such file or folder")


def _find_local(url: str, hints: list[str]) -> Iterator[File]:
    for path in _local_paths(url, hints):
        try:
            info = os.stat(path)
        except OSError as error:
            if not os.path.islink(path):
                raise
            why = "a link in a loop" if error.errno == errno.ELOOP else "a link to nowhere"
            raise UserError(f"{path}: {why}; remove it, or restore the file that it names") from error
        if not stat.S_ISREG(info.st_mode):
            raise UserError(f"{path}: not a regular file, and a shard is read more than once; copy it to a file")
        yield File(path, info.st_size, info.st_mtime_ns, (info.st_dev, info.st_ino))


def _local_paths(url: str, hints: list[str]) -> Iterator[str]:
    if os.path.isdir(url):
        paths = sorted(_below(url, _above(url), hints))
        hints += _left_out(paths)
        yield from (path for path in paths if path.endswith(ENDINGS))
    elif os.path.lexists(url):
        yield url
    elif "**" in url:
        yield from _recursive(url, hints)
    elif glob.has_magic(url):
        for path in sorted(glob.iglob(url)):
            if path.endswith(ENDINGS) or os.path.isdir(path):
                yield from _local_paths(path, hints)


def _recursive(url: str, hints: list[str]) -> Iterator[str]:
    """Yield the shards that a glob with ** names, or that are in folders that it names."""
    parts = url.split("/")
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    folder, pattern = "/".join(parts[:fixed]) or "/", parts[fixed:] + ["*"] * (parts[-1] == "**")
    if not os.path.isdir(folder):
        return
    for path in sorted(_below(folder, _above(folder), hints)):
        names = path[len(folder) :].lstrip("/").split("/")
        if path.endswith(ENDINGS) and any(_matches(names[: end + 1], pattern) for end in range(len(names))):
            yield path


def _below(folder: str, above: tuple[tuple[int, int], ...], hints: list[str]) -> Iterator[str]:
    """Yield the files in a folder and its sub-folders, without hidden ones.

    A link to a folder above is not followed.
    """
    info = os.stat(folder)
    identity = info.st_dev, info.st_ino
    if identity in above:
        link = os.path.join(os.path.realpath(os.path.dirname(folder)), os.path.basename(folder))
        hint = f"{link} is a link to a folder above it, and was not followed"
        hints += [hint] * (hint not in hints)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from _below(entry.path, (*above, identity), hints)
                continue
            if entry.is_symlink() and not entry.name.endswith(ENDINGS) and not os.path.exists(entry.path):
                hints.append(f"{entry.path} is a link to nowhere, and was not followed")
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop
        return False


def _above(folder: str) -> tuple[tuple[int, int], ...]:
    """Return the identities of the folders above a folder."""
    infos = [os.stat(parent) for parent in Path(folder).resolve().parents]
    return tuple((info.st_dev, info.st_ino) for info in infos)


def _left_out(paths: Iterable[str]) -> list[str]:
    """Return a hint if some of the files are tars under a compression that is not read."""
    compressed = [path for path in paths if path.endswith(tuple(COMPRESSED))]
    if not compressed:
        return []
    command = next(command for ending, command in COMPRESSED.items() if compressed[0].endswith(ending))
    return [f"{len(compressed)} compressed tars are not read, as {compressed[0]}; decompress them with `{command}`"]


def _look_up(urls: list[str]) -> dict[str, fs.FileInfo | None]:
    """Return the file info at each URL. Several URLs in one folder take one listing, not a request each."""
    folders = defaultdict(list)
    for url in urls:
        folders[url.rpartition("/")[0]].append(url)
    infos: dict[str, fs.FileInfo | None] = {}
    for inside in folders.values():
        paths = {url: filesystem(url)[1] for url in inside}
        store, path = filesystem(inside[0])
        folder = fs.FileSelector(path.rpartition("/")[0], allow_not_found=True)
        known = {info.path: info for info in store.get_file_info(folder if len(inside) > 2 else list(paths.values()))}
        infos |= {url: known.get(path) for url, path in paths.items()}
    return infos


def _find_remote(url: str, info: fs.FileInfo | None, hints: list[str]) -> Iterator[File]:
    """Yield the files that a URL names: itself, those below a folder, or those that match a glob, from one listing."""
    if info is not None and info.type == fs.FileType.File:
        yield File(url, info.size, info.mtime_ns, url)
        return
    pattern = (
        [*url.split("/"), "**", "*"] if info is not None and info.type == fs.FileType.Directory else url.split("/")
    )
    fixed = next((index for index, part in enumerate(pattern) if index > 2 and glob.has_magic(part)), 0)
    if not fixed:
        return
    base = "/".join(pattern[:fixed])
    store, path = filesystem(base)
    below = fs.FileSelector(path, allow_not_found=True, recursive=fixed < len(pattern) - 1)
    infos = sorted(store.get_file_info(below), key=lambda info: str(info.path))
    hints += _left_out(info.path for info in infos if _matches(info.path[len(path) + 1 :].split("/"), pattern[fixed:]))
    for info in infos:
        parts = info.path[len(path) + 1 :].split("/")
        if info.type == fs.FileType.File and info.path.endswith(ENDINGS) and _matches(parts, pattern[fixed:]):
            matched = "/".join([base, *parts])
            yield File(matched, info.size, info.mtime_ns, matched)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Return whether path components match a glob's, as the glob module matches local files."""
    if not parts or not pattern:
        return not parts and not pattern
    if pattern[0] == "**" and len(pattern) > 1:
        hidden = parts[0].startswith(".")
        return _matches(parts, pattern[1:]) or (not hidden and _matches(parts[1:], pattern))
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _distinct(files: Iterable[File]) -> tuple[list[File], list[str]]:
    """Return the files, in order, and the URLs that repeat a file, also through a symbolic link."""
    distinct: dict[str, File] = {}
    repeats: list[str] = []
    first: dict[object, str] = {}
    for file in files:
        other = first.setdefault(file.identity, file.url)
        # Some file systems give two files one number, so the real paths are compared as well.
        if file.url in distinct or (other != file.url and os.path.realpath(other) == os.path.realpath(file.url)):
            repeats.append(file.url)
        else:
            distinct[file.url] = file
    return list(distinct.values()), repeats


def _sibling_hint(url: str) -> list[str]:
    """Return a hint if the only shard is one of many whose names differ only in numbers."""
    folder, _, name = url.rpartition("/")
    if _remote(url):
        store, path = filesystem(folder)
        siblings = [str(info.base_name) for info in store.get_file_info(fs.FileSelector(path))]
    else:
        siblings = os.listdir(folder)
    like = re.sub(r"\d+", "0", name)
    names = sorted(sibling for sibling in siblings if re.sub(r"\d+", "0", sibling) == like)
    if len(names) < 2:
        return []
    return [f"{name} is 1 of {len(names)} sibling shards; for all of them: '{folder}/{_span(names)}'"]


def _span(names: list[str]) -> str:
    """Return one pattern for names that differ only in numbers: braces if one number has no gaps, else a glob."""
    columns = list(zip(*(re.split(r"(\d+)", name) for name in names), strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    low, high = min(varying[0], key=int), max(varying[0], key=int)
    gapless = len(varying) == 1 and int(high) - int(low) + 1 == len(names) and len(low) in (len(high), 1)
    braces = f"{{{low}..{high}}}" if gapless else "*"
    return "".join(braces if column in varying else column[0] for column in columns)


def _names(urls: list[str]) -> list[str]:
    """Return a name for each shard and its output files: its path below the folder that all shards have in common."""
    for url in urls:
        if not url.isascii() and url.encode(errors="replace").decode() != url:
            raise UserError(f"{url!r}: its name is not UTF-8, which run.json needs; rename it")
    common = os.path.commonprefix([min(urls), max(urls)])  # noqa: RUF071 - by character, then cut at a slash
    root = common.rpartition("/")[0]
    names = ["/".join(map(_safe, url[len(root) + 1 :].removesuffix(".tar").split("/"))) for url in urls]
    crowded = {folder: count for folder, count in Counter(map(_folder, names)).items() if count > FLAT}
    names = [_bucketed(name, crowded[_folder(name)]) if _folder(name) in crowded else name for name in names]
    taken: dict[str, str] = {}
    for name, url in zip(names, urls, strict=True):
        if (other := taken.setdefault(name, url)) != url:
            raise UserError(f"{other} and {url} would both get the name {name!r}; rename one of them")
    return names


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _safe(part: str) -> str:
    """Return a component of a name that readers of Parquet folders accept.

    They skip names that begin with a dot or an underscore, and read `key=value` as a column.
    """
    part = re.sub(r'[=\\:*?"<>|{}\[\]#%\x00-\x1f\x7f]', "-", part)
    return f"x{part}" if part[:1] in ("", ".", "_") else part


def _bucketed(name: str, count: int) -> str:
    """Return a name in a sub-folder of its folder, which holds `count` names."""
    folder, _, base = name.rpartition("/")
    buckets = 2 ** round(math.log2(count / BUCKET))
    return f"{folder}/{zlib.crc32(base.encode()) % buckets:03x}/{base}".lstrip("/")
