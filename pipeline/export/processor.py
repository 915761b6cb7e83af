"""The processor of an export: writes the files of a shard into the export's folder, and records what it wrote."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from saltern.pipeline.engine.derived import Source
from saltern.pipeline.export.arrays import write_arrays
from saltern.pipeline.export.coco import read_images
from saltern.pipeline.export.folder import Folder
from saltern.pipeline.export.labelstudio import write_tasks
from saltern.pipeline.export.pictures import write_pictures
from saltern.pipeline.export.sidecars import write_sidecar
from saltern.pipeline.runs.columns import Record, from_records
from saltern.pipeline.runs.datafile import data_schema, reading_data
from saltern.pipeline.runs.manifest import read_receipt
from saltern.pipeline.runs.measured import is_of
from saltern.pipeline.runs.outlet import Made, Outlet, Spec, Tally
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.schemas.choices import ExportFormat
from saltern.schemas.config import ExportConfig
from saltern.schemas.errors import ShardError
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK

# Write the files of a shard, and return the number of its rows.
WRITERS: dict[str, Callable[[Folder, SaliencyRun, Shard], int]] = {
    ExportFormat.wds: write_sidecar,
    ExportFormat.npy: write_arrays,
    ExportFormat.png: write_pictures,
    ExportFormat.labelstudio: write_tasks,
}
_NO_TARS = (ExportFormat.wds, ExportFormat.npy, ExportFormat.png)  # formats that read the run alone


class ExportProcessor:
    """Exports shards of a run. Each file appears when it is whole, so workers write them in place.

    Args:
        spec: of the export's records.
        source: the run.
        out: folder or URL of the export.
    """

    def __init__(self, spec: Spec, source: Source, out: str):
        self._form = spec.run.config_of(ExportConfig).form
        self._run = source.open()
        self._folder = Folder.at(out, spec.scratch)
        self._folder.mark(self._run, self._form)
        self._spec, self._outlet, self._schema = spec, Outlet(spec), data_schema(spec.run, {})
        self.images: dict[str, int] = {}

    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made:
        """Export one shard. A receipt of the same data file is confirmed, unless the format reads the tar.

        Raises:
            ShardError: tar and data file do not fit, or one of them is damaged.
            OSError: an error of the environment, worth a retry.
            OutputError: the folder accepts no more data.
        """
        receipt = read_receipt(self._run.store, self._run.run, shard.name)
        if earlier is not None and is_of(earlier, receipt.digest) and self._form in _NO_TARS:
            return Made(replace(earlier, mtime_ns=shard.mtime_ns), {})
        tally = Tally()
        self.images[shard.name] = 0
        try:
            with self._outlet.open(self._schema, tally) as writer:
                for rows, records in self._export(shard):
                    tally.statuses[OK] += rows
                    with self._outlet.writing(tally):
                        writer.write(from_records(records, self._schema))
                tally.samples, tally.content = receipt.samples, int(receipt.digest[:8], 16) << 32
                return self._outlet.close(shard, writer, tally, 0)
        except ValueError as error:  # of a row that lacks what its map needs
            raise ShardError(str(error)) from error
        finally:
            del self.images[shard.name]

    def close(self) -> None:
        """There is nothing to release."""

    def _export(self, shard: Shard) -> Iterator[tuple[int, list[Record]]]:
        """Yield numbers of exported rows, with records of what was written."""
        if self._form == ExportFormat.coco:
            for rows, record in read_images(self._run, shard):
                yield rows, [] if record is None else [record]
                self.images[shard.name] += 1
            return
        folder = replace(self._folder, files={})
        before = self._recorded(shard)
        rows = WRITERS[self._form](folder, self._run, shard)
        folder.store.remove(before - folder.files.keys())
        yield rows, [{"file": name, "bytes": size} for name, size in folder.files.items()]

    def _recorded(self, shard: Shard) -> set[str]:
        """Return the names of the files of an earlier export of the shard, as pictures of keys that may be gone."""
        try:
            with reading_data(self._outlet.store, self._spec.run, shard) as file:
                names = file.read(["file"], use_threads=False)["file"].to_pylist()
        except ShardError:
            return set()
        return {name for name in names if name.startswith((f"{shard.name}/", f"{shard.name}.")) and ".." not in name}
