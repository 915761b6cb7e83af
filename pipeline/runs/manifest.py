"""The state of a run's folder: run.json, receipts and failures."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Run, Shard


def data_name(shard: str) -> str:
    return f"data/{shard}.parquet"


def receipt_name(shard: str) -> str:
    return f"receipts/{shard}.json"


def failure_name(shard: str) -> str:
    return f"failures/{shard}.json"


def load_run(store: Store) -> Run | None:
    """Return the run in the folder, or None. Raises UserError if run.json is damaged."""
    raw = store.read("run.json")
    return None if raw is None else Run.from_json(raw)


def load_run_folder(root: str, job: str | None = None) -> tuple[Store, Run]:
    """Return the store and the run of a folder. Raises UserError if it has no run, or one of another job than `job`."""
    store = Store(root)
    run = load_run(store)
    if run is None:
        raise UserError(f"{root} holds no run (no run.json); `saltern extract ... --out {root}` makes one")
    if job is not None and run.config.job != job:
        raise UserError(
            f"{root} is a run of {run.config.job}, which holds no saliency dataset: look at its pictures, or open its "
            "Parquet files with any reader"
        )
    return store, run


def wipe(store: Store) -> None:
    """Remove a run. Receipts go first and run.json last, so that a kill at any moment leaves a valid run or none."""
    derived = ("metrics", "pictures", "pictures.png", "attack.png", "show.html")
    for name in ("receipts", "failures", *derived, "data", "run.json"):
        store.remove(name)


def begin(store: Store, run: Run, scratch: Path) -> Run:
    """Write run.json, or resume the run that the folder has.

    Returns:
        The run in the folder, with the present sizes of its shards.

    Raises:
        UserError: the folder has another config or another list of shards; the message names each key that differs.
    """
    for _ in range(2):
        existing = load_run(store)
        if existing is not None:
            break
        if store.create(_scratch_file(scratch, run.to_json()), "run.json"):
            return run
    if existing is None:
        raise UserError(f"run.json in {store.path} appears and disappears: is another --overwrite running?")
    differing = existing.config.differences(run.config) + _shard_differences(existing.shards, run.shards)
    if differing:
        raise UserError(
            f"{store.path} holds a run with another config: {'; '.join(differing)}. "
            "Use the old settings, choose another --out, or replace the run with --overwrite"
        )
    if existing.shards != run.shards:
        existing = replace(existing, shards=run.shards)
        store.publish(_scratch_file(scratch, existing.to_json()), "run.json")
    return existing


def publish_receipt(store: Store, receipt: Receipt, scratch: Path) -> None:
    """Publish a shard's receipt. This is the shard's last write and marks it as done."""
    store.publish(_scratch_file(scratch, receipt.to_json()), receipt_name(receipt.shard))


def publish_failure(store: Store, failure: Failure, scratch: Path) -> None:
    store.publish(_scratch_file(scratch, failure.to_json()), failure_name(failure.shard))


def read_receipt(store: Store, run: Run, shard: Shard) -> Receipt | None:
    """Return the shard's receipt if it has this run's fingerprint and the tar's present size, else None."""
    raw = store.read(receipt_name(shard.name))
    return None if raw is None else _valid_receipt(raw, run.fingerprint, shard)


def read_receipts(store: Store, run: Run) -> dict[str, Receipt]:
    """Return the receipts of the shards that are done, by shard name. One listing; 100,000 receipts take seconds."""
    shards = {shard.name: shard for shard in run.shards}
    receipts: dict[str, Receipt] = {}
    for name, raw in store.read_all("receipts"):
        shard = shards.get(name.removesuffix(".json"))
        receipt = None if shard is None else _valid_receipt(raw, run.fingerprint, shard)
        if receipt is not None:
            receipts[receipt.shard] = receipt
    return receipts


def read_failures(store: Store, done: Iterable[str]) -> dict[str, Failure]:
    """Return the failures of shards that are not done, by shard name."""
    finished = set(done)
    failures = (Failure.from_json(raw) for _, raw in store.read_all("failures"))
    return {failure.shard: failure for failure in failures if failure.shard not in finished}


def _shard_differences(existing: Sequence[Shard], asked: Sequence[Shard]) -> list[str]:
    old, new = {shard.url: shard for shard in existing}, {shard.url: shard for shard in asked}
    gone, added = [url for url in old if url not in new], [url for url in new if url not in old]
    if gone or added:
        first = [f"-{url}" for url in gone[:2]] + [f"+{url}" for url in added[:2]]
        return [f"shards: {len(added)} added, {len(gone)} missing ({', '.join(first)})"]
    if any(old[url].name != new[url].name for url in old):
        return ["shards: the same files under other names"]
    return []


def _valid_receipt(raw: bytes, fingerprint: str, shard: Shard) -> Receipt | None:
    try:
        receipt = Receipt.from_json(raw)
    except (ValueError, TypeError, KeyError):
        return None  # damaged: the shard is done again
    valid = receipt.fingerprint == fingerprint and receipt.size == shard.size and receipt.shard == shard.name
    return receipt if valid else None


def _scratch_file(scratch: Path, content: bytes) -> Path:
    path = scratch / uuid.uuid4().hex
    path.write_bytes(content)
    return path
