"""Begin a run in its folder: check that nothing of others is lost, resume, or replace the run that is there."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata

from saltern import __version__
from saltern.pipeline.runs.manifest import (
    data_name,
    failure_name,
    judge_receipts,
    load_run,
    other_sizes,
    picture_name,
    read_failures,
    receipt_name,
)
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import ATTACK, VISUALIZE, RunConfig
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import FIELDS
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Run, Shard, classes_of, same_time

WRITTEN = ("data", "receipts", "failures", "metrics", "pictures")  # folders of a run
# A family of metrics is a run in a folder of its name; its summary and plot are files of that name.
_FAMILY = "|".join(FIELDS)
_METRIC = re.compile(rf"^metrics/({_FAMILY})(-controls)?/(?=(data|receipts|failures)/|run\.json$)")
_SUMMARY = re.compile(rf"metrics/({_FAMILY})\.(json|png)")
version = cache(metadata.version)  # each call parses the description of a package, which takes milliseconds
_SHEETS = {ATTACK: {"attack.png"}, VISUALIZE: {"pictures.png"}}


def new_run(config: RunConfig, shards: list[Shard], class_names: list[str] | None) -> Run:
    """Return a run with its fingerprint and the versions of the installed packages."""
    installed = {name: version(name) for name in ("torch", "torchvision", "pyarrow", "pillow", "numpy")}
    versions = {"saltern": __version__, **installed}
    return Run(config, shards, versions, config.fingerprint(), class_names)


def check_folder(store: Store, old: Run | None, run: Run, why: str = "") -> None:
    """Check that the run overwrites no input, and no file of another origin. Changes nothing.

    Args:
        old: the run in the folder, which `run` resumes or replaces.
        why: the reason why files in a folder without run.json are not those of `run`.

    Raises:
        UserError: a shard is in the run's folder, or an unknown file has the name of a data file or a receipt.
    """
    folders = {f"{_place(store.full(name))}/": name for name in WRITTEN}
    for shard in run.shards:
        place = _place(shard.url)
        for folder, name in folders.items():
            if place.startswith(folder):
                raise UserError(
                    f"{shard.url}: this input lies in {store.full(name)}, where the run writes: "
                    "move the shards, or give another --out"
                )
    new = {shard.name for shard in run.shards} - {shard.name for shard in (old.shards if old else ())}
    for folder, suffix in (("data", ".parquet"), ("receipts", ".json")) if new else ():
        for name in store.listing(folder, suffix):
            if name.removesuffix(suffix) in new:
                raise UserError(
                    f"{store.full(f'{folder}/{name}')} would be overwritten, and no run.json there names it"
                    f"{f' ({why})' if why else ''}: repeat the command that made it, move {store.full('data')} and "
                    f"{store.full('receipts')} away, or give another --out"
                )


def _place(url: str) -> str:
    """Return where a file is, with links resolved; of a URL, bucket and path."""
    if "://" in url:
        return re.sub(r"^[^/]*://([^/@]*@)?", "", url)
    folder, name = os.path.split(url)
    path = os.path.join(_real_folder(folder), name)
    return os.path.realpath(path) if os.path.islink(path) else path


@cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def remove_run(store: Store, old: Run, run: Run) -> None:
    """Remove the files that the records of `old` name, except run.json and inputs. Receipts go first, data files last.

    Args:
        run: the run that replaces `old`; its inputs are kept too.
    """
    names = _names(old)
    inputs = {_place(shard.url) for shard in (*old.shards, *run.shards)}
    for folder in ("receipts", "failures", "metrics", "pictures", "data"):
        there = [f"{folder}/{name}" for name in store.listing(folder, "")]
        own = (name for name in there if _METRIC.sub("", name) in names or _SUMMARY.fullmatch(name))
        store.remove(name for name in own if _place(store.full(name)) not in inputs)
        store.prune(folder)
    store.remove(name for name in names - {"run.json"} if "/" not in name)


def _names(run: Run) -> set[str]:
    """Return the names of the files that a run may have in its folders."""
    names = {"run.json"} | _SHEETS.get(run.config.job, set())
    for shard in run.shards:
        name = shard.name
        names |= {receipt_name(name), failure_name(name), data_name(name), f"metrics/localization/{name}.parquet"}
        if run.config.job == VISUALIZE:
            names |= {picture_name(number, run.class_names) for number in classes_of(shard)}
    return names


def begin(store: Store, run: Run, *, overwrite: bool = False) -> Run:
    """Write run.json, or resume the run that the folder has, or replace it.

    Returns:
        The run in the folder, with the present sizes of its shards.

    Raises:
        UserError: the folder has another config or another list of shards; the message names each key that differs.
    """
    existing = load_run(store)
    if existing is not None and not overwrite:
        check_same(store, existing, run)
        run = replace(existing, config=run.config, shards=run.shards)  # weights may have another place now
    elif existing is not None:
        remove_run(store, existing, run)
    if run != existing:
        store.write("run.json", run.to_json())
    return run


def check_same(store: Store, existing: Run, run: Run) -> None:
    """Check that a run can be resumed. Raises UserError if config or shards differ; the message names each key."""
    differing = existing.config.differences(run.config) + _shard_differences(existing.shards, run.shards)
    if differing:
        raise UserError(
            f"{store.path} holds a run with another config: {'; '.join(differing)}. "
            "Use the old settings, choose another --out, or replace the run: remove its folder, or give --overwrite"
        )


@dataclass(frozen=True)
class Begun:
    """The state of a run when it begins, by shard name."""

    receipts: dict[str, Receipt]  # of shards that are done
    invalid: dict[str, str]  # why a shard is done again although it has a receipt
    doubtful: set[str]  # done, but the tar has another mtime: its content must be compared with the receipt
    failures: dict[str, Failure]

    def notes(self) -> list[str]:
        """Return lines for the user about shards that are done or read again."""
        lines = []
        for name, why in list(self.invalid.items())[:1]:
            others = f" (and {len(self.invalid) - 1} others)" if len(self.invalid) > 1 else ""
            lines.append(f"done again, although it has a receipt: {name}: {why}{others}")
        if self.doubtful:
            lines.append(
                f"{len(self.doubtful)} tars have another mtime than when they were read: they are compared with their "
                "receipts, and done again if their content differs"
            )
        return lines


def no_objection(receipt: Receipt) -> str | None:
    """Return None: a valid receipt holds."""


def read_begun(store: Store, run: Run, objection: Callable[[Receipt], str | None] = no_objection) -> Begun:
    """Read which shards of a run are done: those with a valid receipt and its data file. Two listings.

    Args:
        store: of the run.
        run: with the present sizes of its shards.
        objection: returns why the shard of a valid receipt must be done again, or None.
    """
    receipts, invalid = judge_receipts(store, run)
    for name, found in other_sizes(store, receipts.values()).items():
        invalid[name] = f"its data file {found}"
        del receipts[name]
    for name, why in [(name, objection(receipt)) for name, receipt in receipts.items()]:
        if why is not None:
            invalid[name] = why
            del receipts[name]
    doubtful = {
        shard.name
        for shard in run.shards
        if shard.name in receipts and not same_time(shard.mtime_ns, receipts[shard.name].mtime_ns)
    }
    return Begun(receipts, invalid, doubtful, read_failures(store, receipts))


def _shard_differences(existing: Sequence[Shard], asked: Sequence[Shard]) -> list[str]:
    old, new = {shard.url: shard for shard in existing}, {shard.url: shard for shard in asked}
    gone, added = [url for url in old if url not in new], [url for url in new if url not in old]
    if gone or added:
        first = [f"-{url}" for url in gone[:2]] + [f"+{url}" for url in added[:2]]
        return [f"shards: {len(added)} added, {len(gone)} missing ({', '.join(first)})"]
    if any(old[url].name != new[url].name for url in old):
        return ["shards: the same files under other names"]
    return []
