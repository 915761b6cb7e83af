"""Whole images of validation shards, decoded ahead in batches."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice

from saltern.pipeline.extract.batch import Batch, Piece, join
from saltern.pipeline.shards.annotations import read_annotation
from saltern.pipeline.shards.decoder import Decoder, make_decoder
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.shards.samples import Sample, list_keys, read_samples
from saltern.schemas.config import Members, Preprocess
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard

AHEAD = 2  # batches decoded before they are needed
_Pieces = tuple[Shard, Sequence[Sample], list[Piece]]  # with its samples


@dataclass(frozen=True)
class Whole:
    """The samples of some shards, with their whole images as a run's preprocessing gives them."""

    shards: Sequence[Shard]
    preprocess: Preprocess
    batch_size: int  # images of this rank
    threads: int  # that decode
    rank: int = 0  # gets sample i if i % world == rank
    world: int = 1
    labels: Mapping[int, int] | None = None  # the model's class for each number in `cls`; None: the same numbers
    members: Members = Members()  # noqa: RUF009 - frozen

    def batches(
        self, offer: Callable[[Shard, Sample], None] = lambda shard, sample: None
    ) -> Generator[tuple[Shard, Sequence[Sample], Batch], None, None]:
        """Yield batches of this rank's samples, each of one shard.

        Args:
            offer: called with each sample of all ranks.
        """
        with (
            self._threads() as pool,
            contextlib.closing(prefetch(lambda: self._started(pool, offer), AHEAD, _size)) as batches,
        ):
            for shard, samples, pieces in batches:
                yield shard, samples, _joined(pieces)

    def each(self, chosen: Sequence[tuple[Shard, Sample]]) -> Iterator[tuple[Shard, Sample, Batch]]:
        """Yield some samples, each with a batch that holds it."""
        with self._threads() as pool:
            decoder = make_decoder(self.preprocess)
            started = [(shard, sample, self._pieces(pool, decoder, [sample])) for shard, sample in chosen]
            for shard, sample, pieces in started:
                yield shard, sample, _joined(pieces)

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "saltern-decode")

    def _started(self, pool: ThreadPoolExecutor, offer: Callable[[Shard, Sample], None]) -> Iterator[_Pieces]:
        """Yield batches while their images are decoded."""
        numbers, decoder = count(), make_decoder(self.preprocess)
        for shard in self.shards:
            own = self._own(shard, numbers, offer)
            while samples := list(islice(own, self.batch_size)):
                yield shard, samples, self._pieces(pool, decoder, samples)

    def _pieces(self, pool: ThreadPoolExecutor, decoder: Decoder, samples: Sequence[Sample]) -> list[Piece]:
        """Start to decode samples, a piece of them in each thread."""
        pieces, each = [], -(-len(samples) // self.threads)
        for start in range(0, len(samples), each):
            piece = Piece()
            for sample in samples[start : start + each]:
                at = piece.add(sample.key, sample.index, sample.label, None if sample.problem else sample.image)
                if sample.problem is not None:
                    piece.views[0].problems[at] = sample.problem
            pieces.append(piece.start(pool, decoder))
        return pieces

    def _own(self, shard: Shard, numbers: Iterator[int], offer: Callable[[Shard, Sample], None]) -> Iterator[Sample]:
        for sample in read_samples(shard, self.labels, named=self.members):
            offer(shard, sample)
            if next(numbers) % self.world == self.rank:
                yield sample


def check_boxes(shards: Sequence[Shard]) -> None:
    """Raise UserError if a validation shard is broken or gone, or none of the samples has boxes."""
    try:
        for shard in shards:
            list_keys(shard)  # reads the tar to its end
        if not any(_has_boxes(sample) for shard in shards for sample in read_samples(shard)):
            raise UserError(
                "--val: none of the samples has boxes to judge by; `saltern pack --boxes` packs ILSVRC annotations as "
                "`boxes` of the json member"
            )
    except ShardError as error:
        raise UserError(f"--val: a shard is broken: {error}") from error
    except OSError as error:
        raise UserError(f"--val: a shard cannot be read: {error}") from error


def _has_boxes(sample: Sample) -> bool:
    try:
        return read_annotation(sample) is not None
    except ValueError:
        return False


def _joined(pieces: Sequence[Piece]) -> Batch:
    """Wait for the pieces of a batch."""
    return join([piece.wait()[0][0] for piece in pieces])


def _size(batch: _Pieces) -> int:
    return sum(sample.size for sample in batch[1])
