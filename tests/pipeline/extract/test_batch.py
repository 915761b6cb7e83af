"""Pieces of samples become batches of exact sizes, whatever the pieces and whichever images fail."""

import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from saltern.pipeline.extract.batch import Batch, Cutter, Lot, Piece, View, join, lots
from saltern.pipeline.shards.decoder import DecodedBatch, empty_batch

GOOD, BAD, WITHOUT, KEPT = range(4)  # an image, a damaged one, none, and rows of an earlier run


class Numbered:
    """Decoder whose pixels are the number in the file; a file that begins with x is damaged."""

    name, device = "numbered", torch.device("cpu")

    def __call__(self, images: Sequence[bytes]) -> DecodedBatch:
        batch = empty_batch(len(images), 1)
        for slot, image in enumerate(images):
            if image.startswith(b"x"):
                batch.problems[slot] = ("decode_failed", image.decode())
            else:
                number = int(image)
                batch.pixels_BHWC[slot] = number
                batch.size_B2[slot], batch.geometry_B4[slot] = (number, number + 1), number
        return batch


def pieces(kinds: Sequence[int], sizes: random.Random, pool: ThreadPoolExecutor) -> Iterator[Batch]:
    """Yield the samples in pieces of random sizes, decoded."""
    start = 0
    while start < len(kinds):
        stop, piece = start + sizes.randint(1, 7), Piece()
        for index, kind in enumerate(kinds[start:stop], start):
            image = {GOOD: b"%d" % index, BAD: b"x%d" % index}.get(kind)
            at = piece.add(f"k{index}", index, index % 3 or None, image)
            if kind == WITHOUT:
                piece.views[0].problems[at] = ("missing_image", f"{index}")
            elif kind == KEPT:
                piece.views[0].kept[at] = pa.record_batch({"index": [index]})
        (batch,), _ = piece.start(pool, Numbered()).wait()
        assert piece.images == []  # the files' bytes are dropped
        yield batch
        start = stop


def cut(pieces: Iterable[Batch], size: int, longest: int) -> Iterator[Batch]:
    cutter = Cutter(size, longest)
    for piece in pieces:
        yield from map(join, cutter.add(piece))
    yield from map(join, cutter.rest())


def naive_ends(kinds: Sequence[int], size: int, longest: int) -> list[int]:
    """Return the ends of the batches, sample by sample."""
    ends, decoded, length = [], 0, 0
    for number, kind in enumerate(kinds, 1):
        decoded, length = decoded + (kind == GOOD), length + 1
        if decoded == size or length == longest or number == len(kinds):
            ends.append(number)
            decoded = length = 0
    return ends


@pytest.mark.parametrize("shares", [(1, 0, 0, 0), (8, 1, 1, 1), (1, 1, 3, 1), (0, 1, 1, 1)], ids=str)
@pytest.mark.parametrize(("size", "longest"), [(1, 9), (4, 9), (7, 7), (20, 25)])
def test_batches_have_exact_sizes_and_all_samples_in_order(shares: Sequence[int], size: int, longest: int) -> None:
    draw = random.Random(f"{shares}{size}")
    with ThreadPoolExecutor(2) as pool:
        for count in (1, 5, 60):
            kinds = draw.choices(range(4), shares, k=count)
            start = 0
            for batch, stop in zip(
                cut(pieces(kinds, draw, pool), size, longest), naive_ends(kinds, size, longest), strict=True
            ):
                check(batch, kinds, start, stop)
                start = stop


def check(batch: Batch, kinds: Sequence[int], start: int, stop: int) -> None:
    """Check that a batch holds the samples from start to stop."""
    indices = range(start, stop)
    good = [index for index in indices if kinds[index] == GOOD]
    assert batch.indices == [*indices]
    assert batch.keys == [f"k{index}" for index in indices]
    assert batch.labels == [index % 3 or None for index in indices]
    assert batch.decoded == [index - start for index in good]
    assert (batch.pixels_DHWC is None) == (not good)
    if batch.pixels_DHWC is not None:
        assert batch.pixels_DHWC[:, 0, 0].tolist() == [[index] * 3 for index in good]
    assert batch.size_D2.tolist() == [[index, index + 1] for index in good]
    assert batch.geometry_D4.tolist() == [[index] * 4 for index in good]
    assert batch.problems == {
        index - start: ("decode_failed", f"x{index}") if kinds[index] == BAD else ("missing_image", f"{index}")
        for index in indices
        if kinds[index] in (BAD, WITHOUT)
    }
    assert {at: rows["index"].to_pylist() for at, rows in batch.kept.items()} == {
        index - start: [index] for index in indices if kinds[index] == KEPT
    }


def test_refused_images_become_problems() -> None:
    with ThreadPoolExecutor(1) as pool:
        (batch,) = cut(pieces([GOOD, WITHOUT, GOOD, GOOD, BAD, GOOD], random.Random(0), pool), 9, 9)
    batch.refuse([1, 3], ("out_of_memory", "why"))
    assert batch.decoded == [0, 3]
    assert batch.size_D2.tolist() == [[0, 1], [3, 4]]
    np.testing.assert_array_equal(batch.geometry_D4[:, 0], [0, 3])
    assert {at: status for at, (status, _) in batch.problems.items()} == {
        1: "missing_image",
        2: "out_of_memory",
        4: "decode_failed",
        5: "out_of_memory",
    }


def test_runs_share_the_batches_with_the_same_decoded_samples() -> None:
    """The second run leaves out sample 5, the third takes only samples 1 and 6."""
    left_out: dict[str, set[int]] = {"all": set(), "less": {5}, "few": {0, 2, 3, 4, 5, 7, 8}}
    made: dict[str, list[int]] = {name: [] for name in left_out}
    cutters = {name: Cutter(3, 9) for name in made}
    shared: list[Lot] = []
    with ThreadPoolExecutor(1) as pool:
        for start in range(0, 9, 2):
            piece = Piece([View() for _ in made])
            for index in range(start, min(start + 2, 9)):
                at = piece.add(f"k{index}", index, 0, b"%d" % index)
                for name, view in zip(made, piece.views, strict=True):
                    if index in left_out[name]:
                        view.problems[at] = ("missing_label", "why")
            batches, _ = piece.start(pool, Numbered()).wait()
            found = lots({name: [*cutters[name].add(batch)] for name, batch in zip(made, batches, strict=True)})
            shared += found
        shared += lots({name: [*cutter.rest()] for name, cutter in cutters.items()})
    for lot in shared:
        (first, *rest) = lot.values()
        indices = [first.indices[at] for at in first.decoded]
        assert first.pixels_DHWC is not None
        assert first.pixels_DHWC[:, 0, 0, 0].tolist() == indices
        assert all(batch.pixels_DHWC is None for batch in rest)
        assert all([batch.indices[at] for at in batch.decoded] == indices for batch in rest)
        for name, batch in lot.items():
            made[name] += batch.indices
    assert [sorted(lot) for lot in shared] == [["all", "less"], ["all"], ["less"], ["few"], ["all"], ["less"]]
    assert all(indices == [*range(9)] for indices in made.values())
