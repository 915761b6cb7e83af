"""The folders of the runs of one command: read, checked, owned and begun together."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from saltern.pipeline.runs.begin import Begun, begin, check_folder, check_same, read_begun
from saltern.pipeline.runs.manifest import load_run
from saltern.pipeline.runs.recover import recover
from saltern.pipeline.storage.session import Session, session
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import DamagedRunError, UserError, printable
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Run


@dataclass
class Folder:
    """A run's folder, and what it has."""

    name: str  # of the run; empty if it is the only one
    root: str
    store: Store
    existing: Run | None = None
    damage: UserError | None = None
    recovered: Run | None = None
    run: Run = field(init=False)
    held: Session = field(init=False)
    begun: Begun = field(init=False)

    def lacks(self, shard: str, retry_failed: bool) -> bool:
        """Return whether a shard is to be made. If it has a receipt, that may be confirmed, or its rows kept."""
        receipt = self.begun.receipts.get(shard)
        return receipt is None or shard in self.begun.doubtful or (retry_failed and receipt.failed > 0)

    def say(self, line: str) -> None:
        """Print a line for the user, with the run's name if there are several."""
        print(printable(f"{self.name}: {line}" if self.name else line), file=sys.stderr)


def read_folders(root: str, names: Sequence[str]) -> list[Folder]:
    """Return the folders of the runs, as they are. Raises UserError if a folder with runs in it is one itself.

    Args:
        root: of the command.
        names: of the runs, each in a folder below the root; an empty name is a run in the root.
    """
    if list(names) == [""]:
        return [_read_folder("", root)]
    if Store(root).read("run.json") is not None:
        raise UserError(
            f"{root} is a run, and several methods write a run each in folders below --out: give another --out"
        )
    return [_read_folder(name, f"{root.rstrip('/')}/{name}") for name in names]


def _read_folder(name: str, root: str) -> Folder:
    folder = Folder(name, root, Store(root))
    try:
        folder.existing = load_run(folder.store)
    except DamagedRunError as error:
        folder.damage = error
    return folder


def start(
    stack: contextlib.ExitStack,
    root: str,
    folders: Sequence[Folder],
    overwrite: bool,
    objection: Callable[[Receipt], str | None],
) -> None:
    """Own the runs' folders, and begin the runs in them. If a run.json is missing or damaged, write it again.

    Nothing is written before all folders are checked and owned. `objection` is that of `read_begun`.
    """
    for it in folders:
        it.recovered, why = (None, "") if it.existing else recover(it.store, it.run, it.damage)
        check_folder(it.store, it.existing or it.recovered, it.run, why)
        if it.existing and not overwrite:
            check_same(it.store, it.existing, it.run)
    if len(folders) > 1 and "://" not in root and not os.path.exists(root):
        stack.callback(_remove_empty, root)  # a refused call leaves nothing
    for it in folders:
        it.held = stack.enter_context(session(it.store))
    for it in folders:
        if it.recovered is not None:
            it.store.write("run.json", it.recovered.to_json())
            it.say("run.json was missing or damaged, and is written again: all files are of this command")
        it.run = begin(it.store, it.run, overwrite=overwrite)
        it.begun = read_begun(it.store, it.run, objection)


def _remove_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)
