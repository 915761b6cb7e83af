"""What one finished shard reports. Its receipt is written last: where it stands, the shard's data file is whole."""

import json
from dataclasses import asdict, dataclass

PHASES = ("read", "decode", "compute", "write")


@dataclass(frozen=True, slots=True)
class Receipt:
    """One finished shard."""

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
    batch_size: int = 0  # as used at the end; smaller than the run's where memory ran out

    @property
    def failed(self) -> int:
        """Rows whose status is not `ok`."""
        return self.rows - self.statuses.get("ok", 0)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, raw: bytes | str) -> "Receipt":
        """Raises ValueError or TypeError where the bytes are no receipt."""
        return cls(**json.loads(raw))


@dataclass(frozen=True)
class Failure:
    """The last failure of a shard that has no receipt. Removed when the shard succeeds."""

    shard: str
    kind: str  # data | world | poison | timeout
    reason: str  # in words, one line
    attempts: int

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, raw: bytes | str) -> "Failure":
        return cls(**json.loads(raw))
