"""Count the samples of an evaluation by how they could be judged, and name those that could not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import MISSING, UNREADABLE
from saltern.schemas.saliency import OK, ZERO_MAP

LISTED = 100  # samples that a summary names; the Parquet files hold all


@dataclass
class Census:
    """The samples of an evaluation of one run."""

    sized: bool = False  # whether the rows have the column other_size
    statuses: Counter[str] = field(default_factory=Counter)
    other_size: int = 0  # samples annotated at another size than the image has
    failed: dict[str, str] = field(default_factory=dict)  # shard and key -> status and reason; at most LISTED
    bad: dict[str, str] = field(default_factory=dict)  # shard and key -> why its annotation is bad; at most LISTED

    @property
    def columns(self) -> list[str]:
        """The columns that are counted."""
        return ["key", "status", "error", *(["other_size"] * self.sized)]

    @property
    def judged(self) -> int:
        """Samples that the means are over."""
        return self.statuses.total() - self.missing - self.unreadable

    @property
    def missing(self) -> int:
        """Samples without an annotation."""
        return sum(self.statuses[status] for status in MISSING)

    @property
    def unreadable(self) -> int:
        """Samples whose annotation cannot be read."""
        return sum(self.statuses[status] for status in UNREADABLE)

    @property
    def failures(self) -> int:
        """Samples whose row in the run failed."""
        return self.judged - self.statuses[OK] - self.statuses[ZERO_MAP]

    def add(self, shard: str, rows: pa.RecordBatch) -> None:
        """Count rows of a run's own maps, which have `columns`."""
        self.statuses.update(rows["status"].to_pylist())
        if self.sized:
            self.other_size += pc.sum(rows["other_size"]).as_py() or 0
        if len(self.failed) < LISTED or len(self.bad) < LISTED:
            _name(self, shard, rows.select(["key", "status", "error"]).to_pylist())

    def require(self, path: str, what: str, fix: str, unread: Mapping[str, str]) -> None:
        """Raise UserError if all shards were read and no sample could be judged.

        Args:
            path: of the run.
            what: that each sample needs.
            fix: how samples get it.
            unread: shards that could not be read.
        """
        if not self.statuses and not unread:
            raise UserError(f"{path}: no sample to judge: its shards hold none; look at their members with tar tf")
        if not self.judged and not unread:
            why = "; ".join(f"{place}: {reason}" for place, reason in list(self.bad.items())[:1])
            raise UserError(f"{path}: none of the {self.statuses.total():,} samples has {what} ({why or fix})")

    def summary(self) -> dict[str, Any]:
        """Return the counts as JSON."""
        return {
            "samples": self.judged,
            "statuses": dict(self.statuses.most_common()),
            "annotated_at_another_size": self.other_size,
            "first_failed": self.failed,
            "first_bad_annotations": self.bad,
        }


def _name(census: Census, shard: str, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        place, status = f"{shard}: {row['key']}", row["status"]
        if status in UNREADABLE and len(census.bad) < LISTED:
            census.bad[place] = row["error"]
        elif status not in (OK, ZERO_MAP, *MISSING, *UNREADABLE) and len(census.failed) < LISTED:
            census.failed[place] = f"{status}: {row['error']}"
