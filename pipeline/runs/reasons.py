"""Count why rows are not ok, and say when too many are not."""

import re
from collections.abc import Iterable, Mapping

from saltern.schemas.errors import printable
from saltern.schemas.receipt import Receipt
from saltern.schemas.saliency import DECODE_FAILED, MISSING_LABEL, OK, OUT_OF_MEMORY, TOO_LARGE, ZERO_MAP

MIN_OK = 0.5  # share of rows; a run with a smaller one is no success
SHOWN = 8  # reasons of a shard that its receipt keeps, and of a run that are printed
_GROUPS, _LONGEST = 64, 200  # reasons counted at a time; characters of one
_OTHER = "other reasons"
_FIXES = {
    DECODE_FAILED: "look at these files, or pack their originals again",
    TOO_LARGE: "pack smaller copies of these images",
    MISSING_LABEL: "give labels with --labels FILE, or explain the model's own choice with --target top1",
    ZERO_MAP: "try another --layer or --method",
    OUT_OF_MEMORY: "do them again with --retry-failed on a machine or device with more free memory",
}


class Reasons:
    """Counts of reasons. Those that differ only in numbers and quoted names are one; the first text stands for all."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}  # by text
        self._texts: dict[str, str] = {}  # by group

    def add(self, text: str, count: int = 1) -> None:
        text = printable(text)
        group = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "#", text[:_LONGEST])
        if group not in self._texts and len(self._texts) >= _GROUPS:
            group = text = _OTHER
        text = self._texts.setdefault(group, text[:_LONGEST])
        self._counts[text] = self._counts.get(text, 0) + count

    def top(self) -> dict[str, int]:
        """Return the most frequent reasons, the first before the others."""
        return dict(sorted(self._counts.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN])


def reasons_of(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return the most frequent reasons of a run, as `status: error`; empty in runs of saltern 0.1."""
    reasons = Reasons()
    for receipt in receipts:
        for text, count in receipt.reasons.items():
            reasons.add(text, count)
    return reasons.top()


def too_few_ok(rows: Mapping[str, int], reasons: Mapping[str, int]) -> str | None:
    """Return a line with the most frequent reason and its fix if no row or less than MIN_OK of the rows are ok.

    Zero maps are true results, and count as ok unless no row is.

    Args:
        rows: of the run, by status.
        reasons: of `reasons_of`.
    """
    total, good = sum(rows.values()), rows.get(OK, 0)
    if good and good + rows.get(ZERO_MAP, 0) >= MIN_OK * total:
        return None
    if not total:
        return "no row: the shards hold no samples; look at their members with tar tf"
    worst = max((status for status in rows if status != OK), key=lambda status: rows[status])
    reason = next((text for text in reasons if text.startswith(f"{worst}: ")), worst)
    fix = f"; {_FIXES[worst]}" if worst in _FIXES else ""
    return f"{good:,} of {total:,} rows are ok, {'none' if not good else 'less than half'}; most often {reason}{fix}"
