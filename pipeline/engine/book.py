"""The driver's access to the folders of the runs that it makes."""

from collections.abc import Sequence

from saltern.pipeline.engine.folders import Folder
from saltern.pipeline.runs.begin import Begun
from saltern.pipeline.runs.manifest import failure_name, receipt_name
from saltern.pipeline.runs.outlet import Earlier, Made, MadeTogether, accepted
from saltern.pipeline.storage.lock import Lock
from saltern.pipeline.storage.store import Store
from saltern.schemas.receipt import Failure, Receipt


class Book:
    """The driver's access to a run's folder. Nothing else publishes."""

    def __init__(self, store: Store, lock: Lock, begun: Begun):
        self.store, self._lock = store, lock
        self._recorded = {*begun.receipts, *begun.invalid}
        self._failing = set(begun.failures)

    def publish(self, made: Made) -> Receipt:
        """Publish a shard's files, then its receipt. An old receipt goes first, so that none is ever of other data."""
        receipt = made.receipt
        with accepted(self.store):
            self._lock.check()
            if made.files and receipt.shard in self._recorded:
                self.store.remove([receipt_name(receipt.shard)])
            for name, source in made.files.items():
                self.store.move(source, name)
            self.store.write(receipt_name(receipt.shard), receipt.to_json())
            if receipt.shard in self._failing:
                self.store.remove([failure_name(receipt.shard)])
        return receipt

    def failed(self, failure: Failure) -> None:
        with accepted(self.store):
            self._lock.check()
            self.store.write(failure_name(failure.shard), failure.to_json())


class Books:
    """The driver's access to the folders of the runs of one command.

    A shard that some of the runs have got is made only for the others, also at its next attempt.
    """

    def __init__(self, folders: Sequence[Folder], retry_failed: bool):
        self._folders = {folder.name: folder for folder in folders}
        self._books = {folder.name: Book(folder.store, folder.held.lock, folder.begun) for folder in folders}
        self._retry_failed = retry_failed
        self.published: dict[str, dict[str, Receipt]] = {folder.name: {} for folder in folders}  # by run and shard

    def lacking(self, shard: str) -> dict[str, Receipt | None]:
        """Return the runs that lack a shard, by name, each with its earlier receipt."""
        return {
            name: folder.begun.receipts.get(shard) for name, folder in self._folders.items() if self.lacks(name, shard)
        }

    def lacks(self, run: str, shard: str) -> bool:
        """Return whether a run lacks a shard."""
        return shard not in self.published[run] and self._folders[run].lacks(shard, self._retry_failed)

    def get(self, shard: str) -> Earlier:
        """Return what a processor gets: the receipt if there is one run, else those of the runs that lack the shard."""
        lacking = self.lacking(shard)
        return lacking.get("") if "" in self._folders else lacking

    def publish(self, made: Made | MadeTogether) -> Receipt:
        """Publish a shard in each run that it was made for. Return a receipt of all of them."""
        for name, part in made.parts.items():
            receipt = self._books[name].publish(part)
            self.published[name][receipt.shard] = receipt
        return made.receipt

    def failed(self, failure: Failure) -> None:
        """Record a failure in each run that lacks the shard."""
        for name in self.lacking(failure.shard):
            self._books[name].failed(failure)
