"""The accuracies of a dataset from the hits of its samples, and their intervals."""

import numpy as np
import pytest
from numpy.typing import NDArray

from saltern.pipeline.metrics.localization.accuracy import THRESHOLDS, BoxAccuracies, levels_of, threshold_of


def some_hits(samples: int) -> NDArray[np.bool_]:
    """Return hits that depend on the level: (N, 4, 255)."""
    rng = np.random.default_rng(0)
    start_N41, end_N41 = rng.integers(0, 120, (samples, 4, 1)), rng.integers(60, 255, (samples, 4, 1))
    return (np.arange(255) >= start_N41) & (np.arange(255) < end_N41)


def test_accuracies_are_the_best_over_the_thresholds() -> None:
    hit_NIL = some_hits(300)
    accuracies = BoxAccuracies(draws=20)
    for part in (hit_NIL[:7], hit_NIL[7:7], hit_NIL[7:]):
        accuracies.add(np.packbits(part, axis=2))
    assert accuracies.samples == 300
    at_thresholds = hit_NIL[:, :, levels_of(THRESHOLDS)].mean(0)  # as clovaai counts
    assert accuracies.max_box_acc().value == pytest.approx(at_thresholds[0].max())
    assert accuracies.max_box_acc().thresholds == pytest.approx([THRESHOLDS[at_thresholds[0].argmax()]])
    v2 = accuracies.max_box_acc_v2()
    assert v2.value == pytest.approx(at_thresholds[1:].max(1).mean())
    assert v2.thresholds == pytest.approx(THRESHOLDS[at_thresholds[1:].argmax(1)])


def test_intervals_are_those_of_drawing_samples_again() -> None:
    hit_NIL = some_hits(300)
    accuracies = BoxAccuracies(draws=2000)
    accuracies.add(np.packbits(hit_NIL, axis=2))
    rng = np.random.default_rng(1)
    drawn = [hit_NIL[rng.integers(0, 300, 300)].mean(0).max(1) for _ in range(1000)]
    for best, expected in (
        (accuracies.max_box_acc(), [each[0] for each in drawn]),
        (accuracies.max_box_acc_v2(), [each[1:].mean() for each in drawn]),
    ):
        low, high = np.percentile(expected, [2.5, 97.5])
        assert (best.low, best.high) == pytest.approx((low, high), abs=0.25 * (high - low))
        assert best.low < best.value < best.high


def test_equal_samples_have_no_interval_and_none_have_zero() -> None:
    accuracies = BoxAccuracies(draws=10)
    assert accuracies.max_box_acc().value == 0
    accuracies.add(np.full((40, 4, 32), 255, np.uint8))
    best = accuracies.max_box_acc_v2()
    assert (best.low, best.value, best.high, best.thresholds) == (1, 1, 1, (0, 0, 0))


def test_portions_of_any_size_give_the_same_interval() -> None:
    packed = np.packbits(some_hits(90), axis=2)
    both = BoxAccuracies(draws=50), BoxAccuracies(draws=50)
    both[0].add(packed)
    for start in range(0, 90, 30):
        both[1].add(packed[start : start + 30])
    assert both[0].max_box_acc() == both[1].max_box_acc()
    assert both[0].max_box_acc_v2() == both[1].max_box_acc_v2()


def test_a_level_has_its_smallest_threshold() -> None:
    for level in (0, 1, 127, 254):
        smallest = threshold_of(level)
        assert int(smallest * 255) == level
        assert not level or int((smallest - 0.001) * 255) < level


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="hits of shape"):
        BoxAccuracies().add(np.zeros((3, 32), np.uint8))
