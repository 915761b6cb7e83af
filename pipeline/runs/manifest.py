"""Which shards are wanted, which are done: run.json, receipts and failures of one run folder."""

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
    """The run that stands in the folder, or None. Raises UserError where run.json is damaged."""
    raw = store.read("run.json")
    return None if raw is None else Run.from_json(raw)


def load_run_folder(root: str, job: str | None = None) -> tuple[Store, Run]:
    """Raises UserError where the folder holds no run, or one of another job than the one that is wanted."""
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
    """Remove a run, so that a kill at any moment leaves a run or none: the receipts go first, run.json last."""
    made_of_it = ("metrics", "pictures", "pictures.png", "attack.png", "show.html")
    for name in ("receipts", "failures", *made_of_it, "data", "run.json"):
        store.remove(name)


def begin(store: Store, run: Run, scratch: Path) -> Run:
    """Write run.json, or resume the run that stands there.

    Returns:
        The run as it stands, with the sizes that the shards have now.

    Raises:
        UserError: another config or another list of shards stands in the folder; each differing key is named.
    """
    for _ in range(2):
        standing = load_run(store)
        if standing is not None:
            break
        if store.create(_scratch_file(scratch, run.to_json()), "run.json"):
            return run
    if standing is None:
        raise UserError(f"run.json in {store.path} comes and goes: is another run being started with --overwrite?")
    differing = standing.config.differences(run.config) + _shard_differences(standing.shards, run.shards)
    if differing:
        raise UserError(
            f"{store.path} holds a run under another config: {'; '.join(differing)}. "
            "Go on with the old settings, choose another --out, or start afresh with --overwrite"
        )
    if standing.shards != run.shards:
        standing = replace(standing, shards=run.shards)
        store.publish(_scratch_file(scratch, standing.to_json()), "run.json")
    return standing


def _shard_differences(there: Sequence[Shard], asked: Sequence[Shard]) -> list[str]:
    old, new = {shard.url: shard for shard in there}, {shard.url: shard for shard in asked}
    gone, added = [url for url in old if url not in new], [url for url in new if url not in old]
    if gone or added:
        first = [f"-{url}" for url in gone[:2]] + [f"+{url}" for url in added[:2]]
        return [f"shards: {len(added)} added, {len(gone)} missing ({', '.join(first)})"]
    if any(old[url].name != new[url].name for url in old):
        return ["shards: the same files under other names"]
    return []


def _scratch_file(scratch: Path, content: bytes) -> Path:
    made = scratch / uuid.uuid4().hex
    made.write_bytes(content)
    return made


def publish_receipt(store: Store, receipt: Receipt, scratch: Path) -> None:
    """The last write of a shard: from here on it is done."""
    store.publish(_scratch_file(scratch, receipt.to_json()), receipt_name(receipt.shard))


def publish_failure(store: Store, failure: Failure, scratch: Path) -> None:
    store.publish(_scratch_file(scratch, failure.to_json()), failure_name(failure.shard))


def read_receipt(store: Store, run: Run, shard: Shard) -> Receipt | None:
    """The shard's receipt where the shard is done: of this run's fingerprint and of the tar as it is now."""
    raw = store.read(receipt_name(shard.name))
    return None if raw is None else _standing(raw, run.fingerprint, shard)


def read_receipts(store: Store, run: Run) -> dict[str, Receipt]:
    """Receipts of the shards that are done, by shard name. One listing; 100,000 in seconds."""
    wanted = {shard.name: shard for shard in run.shards}
    found: dict[str, Receipt] = {}
    for name, raw in store.read_all("receipts"):
        shard = wanted.get(name.removesuffix(".json"))
        receipt = None if shard is None else _standing(raw, run.fingerprint, shard)
        if receipt is not None:
            found[receipt.shard] = receipt
    return found


def _standing(raw: bytes, fingerprint: str, shard: Shard) -> Receipt | None:
    try:
        receipt = Receipt.from_json(raw)
    except (ValueError, TypeError, KeyError):
        return None  # damaged: the shard is done again
    whole = receipt.fingerprint == fingerprint and receipt.size == shard.size and receipt.shard == shard.name
    return receipt if whole else None


def read_failures(store: Store, done: Iterable[str]) -> dict[str, Failure]:
    """Failures of shards that are not done, by shard name."""
    finished = set(done)
    found = (Failure.from_json(raw) for _, raw in store.read_all("failures"))
    return {failure.shard: failure for failure in found if failure.shard not in finished}
