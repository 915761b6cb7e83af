"""Test the split of the classes into subsets."""

import math

import pytest

from saltern.pipeline.casm.unseen.split import SUBSETS, make_split, sizes
from saltern.schemas.errors import UserError


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1000, [50, 50, 100, 300, 300, 200]),
        (200, [10, 10, 20, 60, 60, 40]),
        (6, [1] * 6),
        (7, [1, 1, 1, 1, 1, 2]),
        (10, [1, 1, 1, 2, 3, 2]),
        (33, [2, 2, 3, 10, 10, 6]),
    ],
)
def test_sizes_are_the_published_ones_in_proportion(count, expected):
    assert list(sizes(count).values()) == expected


def test_any_count_is_split_whole_near_its_quotas():
    for count in range(6, 1200):
        made = sizes(count)
        assert sum(made.values()) == count
        for name, share in SUBSETS.items():
            quota = count * share / 1000
            assert made[name] >= 1
            if count >= 20:  # every quota is 1 or more
                assert math.floor(quota) <= made[name] <= math.ceil(quota)
    with pytest.raises(UserError, match="5 classes cannot be split into 6 subsets"):
        sizes(5)


def test_a_split_is_seeded_and_disjoint():
    classes = [3 * number for number in range(200)]
    split = make_split(classes, 1)
    assert sorted(label for subset in split.values() for label in subset) == classes
    assert {name: len(subset) for name, subset in split.items()} == sizes(200)
    assert make_split(reversed(classes), 1) == split
    assert make_split(classes, 2) != split
    assert split["D"] != classes[40:100]
