"""Tell a broken environment from broken shards: a circuit breaker over shards that fail one after the other."""

import time

from saltern.schemas.receipt import Failure

THRESHOLD = 3  # different shards in a row that fail by their environment open the circuit
PAUSES_S = (1.0, 5.0, 15.0, 30.0, 60.0)  # before each shard that is tried while the circuit is open


class Circuit:
    """A circuit that opens when several shards in a row fail by their environment, whatever the errors say.

    While it is open, the driver tries one shard after each pause. The first shard that does not fail closes it. If all
    of them fail, the circuit is exhausted and the run should stop.
    """

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget all failures."""
        self.failed: dict[str, Failure] = {}  # in a row, by shard
        self._tries = 0
        self._trying: str | None = None
        self._due = 0.0

    @property
    def is_open(self) -> bool:
        return len(self.failed) >= THRESHOLD

    @property
    def exhausted(self) -> bool:
        return self.is_open and self._trying is None and self._tries > len(PAUSES_S)

    def admits(self) -> bool:
        """Return whether one more shard may be tried now, while the circuit is open."""
        return self._trying is None and not self.exhausted and time.monotonic() >= self._due

    def trying(self, name: str) -> None:
        """Note the shard that is being tried."""
        self._trying = name

    def fail(self, failure: Failure) -> bool:
        """Count a failure by the environment. Return whether it has opened the circuit."""
        before = self.is_open
        self.failed[failure.shard] = failure
        opened = self.is_open and not before
        if opened or failure.shard == self._trying:
            self._trying = None
            self._due = time.monotonic() + PAUSES_S[min(self._tries, len(PAUSES_S) - 1)]
            self._tries += 1
        return opened
