"""Receipts of finished shards, and failures. A receipt is written last: if it exists, the data file is complete."""

from dataclasses import asdict, dataclass, field

from saltern.schemas.seal import build, seal, unseal

PHASES = ("read", "decode", "compute", "write")


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of one finished shard."""

    shard: str  # the shard's name
    size: int  # bytes of the input tar
    fingerprint: str  # of the run's config
    samples: int  # samples in the tar (or the share of them that --limit wants)
    rows: int  # rows in the data file
    statuses: dict[str, int]  # rows by status
    digest: str  # sha256 of the data file, hex
    data_bytes: int  # size of the data file
    seconds: dict[str, float]  # thread seconds by phase (PHASES), and `total`, wall
    worker: str = ""  # host:pid
    batch_size: int = 0  # as used at the end; smaller than the run's if memory ran out
    mtime_ns: int | None = None  # of the input tar; None = unknown
    reasons: dict[str, int] = field(default_factory=dict)  # the most frequent ones of rows that are not ok
    content: str | None = None  # CRC-32 of the samples that were read, 8 hex digits; None in runs of saltern 0.1

    @property
    def failed(self) -> int:
        """Return the number of rows whose status is not `ok`."""
        return self.rows - self.statuses.get("ok", 0)

    def to_json(self) -> bytes:
        return seal(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes, *, sealed: bool = True) -> "Receipt":
        """Parse a receipt; those of saltern 0.1 are not sealed. Raises ValueError if it is not as it was written."""
        return build(cls, unseal(raw, sealed=sealed))


@dataclass(frozen=True)
class Failure:
    """The last failure of a shard that has no receipt. It is removed when the shard succeeds."""

    shard: str
    kind: str  # data | world | poison | timeout | device
    reason: str  # one line
    attempts: int

    def to_json(self) -> bytes:
        return seal(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes, *, sealed: bool = True) -> "Failure":
        """Parse a failure, as `Receipt.from_json`."""
        return build(cls, unseal(raw, sealed=sealed))
