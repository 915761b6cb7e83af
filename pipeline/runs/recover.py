"""Recover a run whose run.json was deleted or damaged, from its receipts and the metadata of its data files."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from saltern.pipeline.runs.datafile import reading
from saltern.pipeline.runs.manifest import data_name, judge_receipts, receipt_name
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Run
from saltern.schemas.saliency import read_metadata


def recover(store: Store, run: Run, damage: UserError | None) -> tuple[Run | None, str]:
    """Return the run in a folder without a whole run.json, if all of its files are of the requested run.

    Args:
        run: as requested. The versions of packages are taken from the data files.
        damage: of run.json; None if it is missing.

    Returns:
        The run, or None; why it is not recovered.

    Raises:
        UserError: run.json is damaged, and the files are not of this run.
    """
    why = "no receipt is there"
    try:
        if found := _recover(store, run):
            return found, ""
    except ShardError as error:
        why = str(error)
    if damage is not None:
        fix = f"repeat the command that made it, move {store.path} away, or choose another --out"
        raise UserError(f"{damage}, and is not written again, as {why}; {fix}") from damage
    return None, why


def _recover(store: Store, run: Run) -> Run | None:
    """Return the run; None without data files and receipts. Raises ShardError for a file that is not of this run."""
    sizes = store.sizes("data")
    data = sorted(f"data/{name}" for name in sizes if name.endswith(".parquet"))
    receipts = [f"receipts/{name}" for name in store.listing("receipts", ".json")]
    if not data and not receipts:
        return None
    _check_names(store, [*data, *receipts], run)
    for name in data[:1]:  # the versions are the same in all files of a run
        run = replace(run, versions=_metadata(store, name, run)["versions"])
    whole, invalid = judge_receipts(store, run)
    for name, why in invalid.items():
        raise ShardError(f"{store.full(receipt_name(name))} is not of this command: {why}")
    sound = {data_name(name) for name, receipt in whole.items() if receipt.data_bytes == sizes.get(f"{name}.parquet")}
    for name in data:
        if name not in sound:  # no receipt vouches for it
            _metadata(store, name, run)
    return run


def _check_names(store: Store, names: Collection[str], run: Run) -> None:
    known = {name(shard.name) for shard in run.shards for name in (data_name, receipt_name)}
    for name in names:
        if name not in known:
            raise ShardError(f"{store.full(name)} is of no shard of this command")


def _metadata(store: Store, name: str, run: Run) -> dict[str, Any]:
    """Return the metadata of a data file. Raises ShardError if the file is damaged or of another run."""
    place = store.full(name)
    with reading(place), store.fs.open_input_file(place) as source:
        found = read_metadata(pq.read_schema(source))
    if found.get("fingerprint") != run.fingerprint or not isinstance(found.get("versions"), dict):
        there, asked = found.get("config"), run.config.marked()
        differing = [key for key in asked if there.get(key) != asked[key]] if isinstance(there, dict) else []
        which = f"another config ({', '.join(differing)})" if differing else "another origin"
        raise ShardError(f"{place} is of {which}")
    return found
