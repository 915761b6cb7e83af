"""The state of a run's folder: run.json, receipts and failures."""

import contextlib
import re
from collections.abc import Iterable, Sequence

from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import DamagedRunError, ShardError, UserError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Run, Shard

AGAIN = "repeat the command that made the run, which writes it again if all files are of its config"


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


_LOOKED_AT = 50  # folders that may hold the run that was meant


def load_run(store: Store) -> Run | None:
    """Return the run in the folder, or None. Raises DamagedRunError, and UserError for another schema version."""
    raw = store.read("run.json")
    try:
        return None if raw is None else Run.from_json(raw)
    except UserError as error:
        raise type(error)(f"{store.path}: {error}") from error


def load_run_folder(root: str, job: str | None = None) -> tuple[Store, Run]:
    """Return the store and the run of a folder. Raises UserError if it has no run, or one of another job than `job`."""
    store = Store(root)
    try:
        run = load_run(store)
    except DamagedRunError as error:
        raise UserError(f"{error}; {AGAIN}") from error
    if run is None and store.listing("receipts", ".json"):
        raise UserError(f"{root} has receipts, but its run.json is missing; {AGAIN}")
    if run is None:
        below = [name for name in store.folders()[:_LOOKED_AT] if store.read(f"{name}/run.json") is not None]
        if below:
            paths = ", ".join(f"{root.rstrip('/')}/{name}" for name in below)
            raise UserError(f"{root} holds no run itself; give one of the runs in it: {paths}")
        raise UserError(f"{root} holds no run (no run.json); `saltern extract ... --out {root}` makes one")
    if job is not None and run.config.job != job:
        raise UserError(
            f"{root} is a run of {run.config.job}, which holds no saliency dataset: look at its pictures, or open its "
            "Parquet files with any reader"
        )
    return store, run


def read_receipts(store: Store, run: Run) -> dict[str, Receipt]:
    """Return the receipts of the shards that are done, by shard name. One listing; 100,000 receipts take seconds."""
    return judge_receipts(store, run)[0]


def read_receipt(store: Store, run: Run, shard: str) -> Receipt:
    """Return a run's receipt of one shard. Raises ShardError if it is gone, damaged, or of another config."""
    raw = store.read(receipt_name(shard))
    try:
        receipt = Receipt.from_json(raw or b"", sealed=run.sealed)
    except ValueError as error:
        raise ShardError(f"{store.path}: the receipt of {shard} is gone or damaged ({error})") from error
    if receipt.fingerprint != run.fingerprint:
        raise ShardError(f"{store.path}: the receipt of {shard} is of a run with another config")
    return receipt


def other_sizes(store: Store, receipts: Iterable[Receipt]) -> dict[str, str]:
    """Return what differs for data files that are missing or of another size, by shard name; from one listing."""
    sizes = store.sizes("data")
    found = {}
    for receipt in receipts:
        size = sizes.get(f"{receipt.shard}.parquet")
        if size != receipt.data_bytes:
            has = f"has {size} bytes, its receipt says {receipt.data_bytes}"
            found[receipt.shard] = "is missing" if size is None else has
    return found


def judge_receipts(store: Store, run: Run) -> tuple[dict[str, Receipt], dict[str, str]]:
    """Return the receipts that hold for this run and its tars' sizes, and why the others do not, by shard name."""
    shards, sealed = {shard.name: shard for shard in run.shards}, run.sealed
    receipts: dict[str, Receipt] = {}
    invalid: dict[str, str] = {}
    for name, raw in store.read_all("receipts"):
        shard = shards.get(name.removesuffix(".json"))
        if shard is None:
            continue
        try:
            receipt = Receipt.from_json(raw, sealed=sealed)
        except ValueError as error:
            invalid[shard.name] = f"its receipt is damaged ({error})"
            continue
        if why := _objection(receipt, run.fingerprint, shard):
            invalid[shard.name] = why
        else:
            receipts[shard.name] = receipt
    return receipts, invalid


def _objection(receipt: Receipt, fingerprint: str, shard: Shard) -> str | None:
    if receipt.shard != shard.name:
        return f"its receipt is of the shard {receipt.shard!r}"
    if receipt.fingerprint != fingerprint:
        return "its receipt is of a run with another config"
    if receipt.size != shard.size:
        return f"its tar has {shard.size} bytes, and had {receipt.size} when it was read"
    return None


def read_failures(store: Store, done: Iterable[str]) -> dict[str, Failure]:
    """Return the failures of shards that are not done, by shard name; damaged records are left out."""
    finished = set(done)
    failures: dict[str, Failure] = {}
    for _, raw in store.read_all("failures"):
        with contextlib.suppress(ValueError):
            failure = Failure.from_json(raw, sealed=False)
            failures[failure.shard] = failure
    return {shard: failure for shard, failure in failures.items() if shard not in finished}
