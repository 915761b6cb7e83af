"""The state of a run's folder: run.json, receipts and failures."""

import re
from collections.abc import Iterable, Sequence

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


def picture_name(number: int, class_names: Sequence[str] | None) -> str:
    """Return the name of a class's picture, `pictures/<number>-<class name>.png`."""
    name = (class_names[number] if class_names else "") or "class"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"pictures/{number:04}-{slug}.png"


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


def _valid_receipt(raw: bytes, fingerprint: str, shard: Shard) -> Receipt | None:
    try:
        receipt = Receipt.from_json(raw)
    except (ValueError, TypeError, KeyError):
        return None  # damaged: the shard is done again
    valid = receipt.fingerprint == fingerprint and receipt.size == shard.size and receipt.shard == shard.name
    return receipt if valid else None
