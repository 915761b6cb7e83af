"""The state and the result of a drive."""

from dataclasses import dataclass, field

from saltern.schemas.receipt import PHASES, Failure, Receipt


@dataclass
class Outcome:
    """The result of a drive."""

    receipts: dict[str, Receipt] = field(default_factory=dict)  # of this drive, by shard
    failures: dict[str, Failure] = field(default_factory=dict)
    stopped: str | None = None  # why it ended early
    device_lost: bool = False  # it stopped because this process has lost its device, and another one can go on
    # Sums over the receipts, so that the progress line needs no scan of them.
    samples: int = 0
    failed_rows: int = 0  # rows whose status is not ok
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    lost: int = 0  # finished images of unfinished shards, when it ended early

    def add(self, receipt: Receipt) -> None:
        """Add the receipt of a finished shard."""
        self.receipts[receipt.shard] = receipt
        self.samples += receipt.samples
        self.failed_rows += receipt.failed
        for phase in PHASES:
            self.seconds[phase] += receipt.seconds[phase]


@dataclass
class State:
    """The state of a drive, as the progress line shows it."""

    outcome: Outcome
    total: int  # shards
    workers: int = 0  # ready
    wanted: int = 0  # workers that were started
    images: int = 0  # finished in this drive, including those of unfinished shards
    notes: list[str] = field(default_factory=list)  # lines for the user, which the progress line prints and removes
