"""The progress of a run: shards that are done, rows by status, failures."""

from collections import Counter
from dataclasses import dataclass

from saltern.pipeline.runs.agreement import label_doubt
from saltern.pipeline.runs.begin import read_begun
from saltern.pipeline.runs.reasons import reasons_of, too_few_ok
from saltern.pipeline.storage.store import Store
from saltern.schemas.run import Run


@dataclass(frozen=True)
class RunStatus:
    """Counts over a run's receipts and failures."""

    fingerprint: str
    job: str
    model: str
    method: str  # empty if the job has none
    shards: int
    done: int  # shards
    samples: int
    rows: dict[str, int]  # by status, the most frequent first
    data_bytes: int
    failures: dict[str, str]  # kind and reason, by shard
    invalid: dict[str, str]  # why a shard with a receipt is not done, by shard
    reasons: dict[str, int]  # the most frequent ones of rows that are not ok
    problem: str | None  # too few rows are ok
    warning: str | None = None  # about the labels


def run_status(store: Store, run: Run) -> RunStatus:
    """Count the shards, samples, rows and failures of a run."""
    begun = read_begun(store, run)
    receipts = begun.receipts
    statuses = sum((Counter(receipt.statuses) for receipt in receipts.values()), Counter[str]())
    rows, reasons = dict(statuses.most_common()), reasons_of(receipts.values())
    return RunStatus(
        fingerprint=run.fingerprint,
        job=run.config.job,
        model=run.config.model,
        method=run.config.to_dict()["method"],
        shards=len(run.shards),
        done=len(receipts),
        samples=sum(receipt.samples for receipt in receipts.values()),
        rows=rows,
        data_bytes=sum(receipt.data_bytes for receipt in receipts.values()),
        failures={name: f"{it.kind}: {it.reason}" for name, it in begun.failures.items()},
        invalid=begun.invalid,
        reasons=reasons,
        problem=too_few_ok(rows, reasons) if receipts else None,
        warning=label_doubt(store, run, receipts),
    )
