"""The shuffled dataset mixes shards within bounded memory, and resumes within an epoch."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import make_run
from torch.utils.data import DataLoader

from saltern.pipeline.runs import mixing
from saltern.pipeline.runs.dataset import SaliencyDataset
from saltern.pipeline.runs.mixing import mix, shards_at_once, shares_after

# On a machine of few cores torch advises against so many workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def mixed(shards: int, each: int, seed: int = 0, samples: int = 200) -> list[tuple[int, int]]:
    streams = [iter([(shard, number) for number in range(each)]) for shard in range(shards)]
    return list(mix(streams, [each] * shards, random.Random(seed), lambda item: 1, samples))


def test_batches_of_shards_of_one_class_have_many_classes() -> None:
    order = mixed(16, 500)
    assert sorted(order) == [(shard, number) for shard in range(16) for number in range(500)]
    counts = [len({shard for shard, _ in order[start : start + 64]}) for start in range(0, 8000, 64)]
    assert min(counts) >= 12  # of 16; 64 draws from all miss 0.3 of them on average
    assert sum(counts) / len(counts) > 15
    # Neighbours of a shard are far apart.
    at = {item: place for place, item in enumerate(order)}
    gaps = [abs(at[0, number + 1] - at[0, number]) for number in range(499)]
    assert sorted(gaps)[250] > 50


def test_shards_of_different_lengths_end_together() -> None:
    lengths = [1000, 10, 300, 1]
    streams = [iter([shard] * length) for shard, length in enumerate(lengths)]
    order = list(mix(streams, lengths, random.Random(1), lambda item: 1, 50))
    assert Counter(order) == Counter(dict(enumerate(lengths)))
    assert {0, 2} <= set(order[-100:])


def test_streams_may_be_longer_or_shorter_than_expected() -> None:
    order = list(mix([iter("aaaa"), iter("b"), iter("")], [2, 3, 9], random.Random(0), lambda item: 1))
    assert sorted(order) == ["a", "a", "a", "a", "b"]


@pytest.mark.parametrize(("size", "samples", "most"), [(1, 30, 30), (mixing.BYTES // 10 + 1, 30, 10), (2**40, 30, 1)])
def test_the_buffer_is_bounded_in_samples_and_bytes(size: int, samples: int, most: int) -> None:
    held = peak = 0

    def stream() -> Iterator[int]:
        nonlocal held, peak
        for number in range(100):
            held += 1
            peak = max(peak, held)
            yield number

    for _ in mix([stream(), stream()], [100, 100], random.Random(0), lambda item: size, samples):
        held -= 1
    assert held == 0
    assert peak == most


@pytest.mark.parametrize(("group", "shards"), [(0, 16), (10**6, 16), (44 * 10**6, 4), (10**9, 2)])
def test_fewer_shards_are_read_at_once_if_their_maps_are_large(group: int, shards: int) -> None:
    assert shards_at_once(group) == shards
    assert shards == 2 or shards * group * 2.5 <= mixing.OPEN_BYTES


def rows(items: Any) -> list[str]:
    return [f"{item['shard']} {item['key']} {item['target']}" for item in items]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 3)])
def test_each_epoch_has_every_row_once_in_another_order(tmp_path: Path, world: int, workers: int) -> None:
    path = str(make_run(tmp_path, shards=7, samples=3, targets=2, broken=((1, 1),)).path)
    expected = sorted(rows(SaliencyDataset(path)))
    loaders = [
        DataLoader(SaliencyDataset(path, shuffle=True, rank=rank, world=world), batch_size=None, num_workers=workers)
        for rank in range(world)
    ]
    epochs = [[rows(loader) for loader in loaders] for _ in range(3)]
    for epoch in epochs:
        assert sorted(chain(*epoch)) == expected
    assert len({str(epoch) for epoch in epochs}) == 3
    shares = {str(sorted(epoch[0])) for epoch in epochs}  # the rows of the first rank
    assert len(shares) == (3 if world > 1 else 1)


@pytest.mark.slow
def test_neighbours_come_from_many_shards(tmp_path: Path) -> None:
    order = list(SaliencyDataset(str(make_run(tmp_path, shards=12, samples=6).path), shuffle=True))
    counts = [len({item["shard"] for item in order[start : start + 12]}) for start in range(0, 72, 12)]
    assert min(counts) >= 5
    assert sum(counts) / len(counts) > 6


def batches(dataset: SaliencyDataset, workers: int, drop_last: bool) -> list[list[str]]:
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, drop_last=drop_last)
    return [list(zip(batch["shard"], batch["key"], batch["target"].tolist(), strict=True)) for batch in loader]


@pytest.mark.slow
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_resumes_at_any_batch(
    tmp_path: Path, workers: int, drop_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing, "OPEN", 2)  # so that a share has several blocks
    # Shards of 4 rows, one of 3: the workers end at different times.
    path = str(make_run(tmp_path, shards=8, samples=4, broken=((2, 1),)).path)
    dataset = SaliencyDataset(path, shuffle=True, seed=4, buffer=5)
    dataset.set_epoch(3)
    whole = batches(dataset, workers, drop_last)
    for taken in range(0, len(whole) + 1, 1 if workers == 0 else 3):
        dataset.set_epoch(3, batches=taken, batch_size=4, drop_last=drop_last)
        assert batches(dataset, workers, drop_last) == whole[taken:]
    following = batches(dataset, workers, drop_last)  # a resumed epoch is followed by the next, whole
    dataset.set_epoch(4)
    assert batches(dataset, workers, drop_last) == following
    assert len(following) >= len(whole) - 3


def test_resuming_opens_only_the_shards_of_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "OPEN", 2)
    dataset = SaliencyDataset(str(make_run(tmp_path, shards=8, samples=5).path), shuffle=True)
    opened: list[str] = []
    joined = dataset._run.joined
    monkeypatch.setattr(dataset._run, "joined", lambda shard: opened.append(shard.name) or joined(shard))
    dataset.set_epoch(0, batches=33)
    assert len(list(dataset)) == 7
    assert len(opened) == 2


@pytest.mark.parametrize(
    ("taken", "lengths", "expected"),
    [
        (0, [5, 5], [(0, 0), (1, 0)]),
        (1, [5, 5], [(1, 0), (0, 2)]),
        (2, [1, 5, 5], [(2, 0), (1, 2), (0, 1)]),
        (99, [1, 5], [(0, 1), (1, 5)]),
        (0, [0, 3], [(1, 0), (0, 0)]),
    ],
)
def test_the_next_worker_comes_first(taken: int, lengths: list[int], expected: list[tuple[int, int]]) -> None:
    assert shares_after(taken, 2, False, lengths) == expected


def test_a_transform_gets_every_item_and_may_change_it(tmp_path: Path) -> None:
    path = str(make_run(tmp_path, targets=2).path)

    def transform(item: dict[str, Any]) -> tuple[float, int]:
        before = float(item["image"].float().sum())
        item["image"].zero_()
        return before, item["target"]

    found = list(SaliencyDataset(path, transform=transform))
    assert found == [(float(item["image"].float().sum()), item["target"]) for item in SaliencyDataset(path)]


def test_tars_may_be_moved(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    before = rows(SaliencyDataset(str(made.path)))
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no such file"):
        list(SaliencyDataset(str(made.path)))
    assert rows(SaliencyDataset(str(made.path), shards=[str(tmp_path / "elsewhere")])) == before


def test_mean_and_std_give_the_network_s_input(tmp_path: Path) -> None:
    dataset = SaliencyDataset(str(make_run(tmp_path, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]).path))
    assert dataset.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert dataset.std.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert ((next(iter(dataset))["image"] / 255 - dataset.mean) / dataset.std).shape == (3, 32, 32)
    assert dataset.mean.dtype == torch.float32


def test_the_page_names_every_key(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/dataset.md").read_text()
    table = re.search(r"^\| key \| of an item \|.*?\n\n", page, re.M | re.S)
    assert table is not None
    named = [name for line in table[0].strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(next(iter(SaliencyDataset(str(make_run(tmp_path).path)))))
