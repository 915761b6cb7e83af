"""The order of a shuffled dataset: streams mixed within bounded memory, and the share of each loader worker."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

OPEN, OPEN_BYTES = 16, 2**29  # shards that a worker reads at once, and the memory of their row groups, at most
SAMPLES, BYTES = 1024, 2**27  # that wait in a worker's buffer, at most

T = TypeVar("T")


def mix(
    streams: Sequence[Iterator[T]],
    lengths: Sequence[int],
    draw: random.Random,
    size_of: Callable[[T], int],
    samples: int = SAMPLES,
) -> Iterator[T]:
    """Yield the items of all streams in a random order.

    Items come from the streams by turns, from each in proportion to its rest, and leave a buffer in a random order.

    Args:
        lengths: items that each stream is expected to have.
        draw: all randomness; the same state and streams give the same order.
        size_of: bytes of an item.
        samples: the buffer's items, at most; it holds BYTES and one item more at most.
    """
    left = dict(enumerate(lengths))
    waiting: list[T] = []
    held = 0
    while left or waiting:
        if left and len(waiting) < samples and held < BYTES:
            number = draw.choices(list(left), [max(1, length) for length in left.values()])[0]
            left[number] -= 1
            try:
                item = next(streams[number])
            except StopIteration:
                del left[number]
                continue
            waiting.append(item)
            held += size_of(item)
        else:
            place = draw.randrange(len(waiting))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            item = waiting.pop()
            held -= size_of(item)
            yield item


def shards_at_once(group_bytes: int) -> int:
    """Return how many shards to read at once, if the largest row group has so many bytes in its file.

    Reading holds a row group twice, as in the file and decompressed: 95 MB for 512 float16 maps of 224 x 224.
    """
    return max(2, min(OPEN, OPEN_BYTES * 2 // (5 * max(1, group_bytes))))


def shares_after(batches: int, batch_size: int, drop_last: bool, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the share and the items to leave out for each worker of a loader that goes on after some batches.

    A DataLoader takes a batch from each worker in turn, and leaves out workers that have no more.

    Args:
        batches: taken before, each of `batch_size` items of one worker.
        lengths: items of each worker's share.
    """
    whole = [length // batch_size if drop_last else -(-length // batch_size) for length in lengths]
    taken = [0] * len(lengths)
    turns = deque(number for number, count in enumerate(whole) if count)
    for _ in range(batches):
        if not turns:
            break
        worker = turns.popleft()
        taken[worker] += 1
        if taken[worker] < whole[worker]:
            turns.append(worker)
    order = [*turns, *(number for number in range(len(lengths)) if number not in turns)]
    finished = [taken[number] == whole[number] for number in range(len(lengths))]
    return [(number, lengths[number] if finished[number] else taken[number] * batch_size) for number in order]
