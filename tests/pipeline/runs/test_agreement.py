"""Labels that are not the model's class numbers are noticed, and those that a weak model misses are not blamed."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from made_run import make_run
from scipy import stats

from saltern.pipeline.runs.agreement import SAMPLES, Agreement, label_doubt, measure_agreement
from saltern.pipeline.runs.manifest import load_run_folder


def agreement(agreeing: int, classes: int, samples: int = SAMPLES) -> Agreement:
    return Agreement(samples, agreeing, classes, True)


@cache
def doubtful(classes: int) -> list[bool]:
    """Return whether each count of agreeing samples raises an alarm."""
    return [agreement(count, classes).doubtful for count in range(SAMPLES + 1)]


def alarms(accuracy: float, classes: int) -> float:
    """Return the probability that labels which the model gets right this often raise an alarm."""
    return float(stats.binom.pmf(np.arange(SAMPLES + 1), SAMPLES, accuracy)[doubtful(classes)].sum())


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 20, 200, 1000])
def test_labels_of_another_dataset_raise_an_alarm(classes: int) -> None:
    assert alarms(1 / classes, classes) > 0.97
    assert alarms(0, classes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 5, 10, 200, 1000])
@pytest.mark.parametrize("accuracy", [0.15, 0.3, 0.9])
def test_a_weak_model_raises_none(classes: int, accuracy: float) -> None:
    chance = 1 / classes
    assert alarms(chance + (1 - chance) * accuracy, classes) < 1e-3


@pytest.mark.slow
def test_three_per_cent_of_a_thousand_classes_are_better_than_chance() -> None:
    assert alarms(0.03, 1000) < 1e-3


def test_few_samples_prove_nothing() -> None:
    assert not agreement(0, 1000, samples=20).doubtful
    assert not agreement(0, 1000, samples=20).proven
    assert agreement(0, 1000, samples=100).doubtful


def test_one_class_is_no_reason_for_doubt() -> None:
    assert not agreement(SAMPLES, 1).doubtful


def test_the_rows_of_a_run_are_counted_once_a_sample(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=5, targets=2, broken=((0, 1),))
    store, run = load_run_folder(str(made.path))
    found = measure_agreement(store, run, {shard.name for shard in run.shards})
    assert found == Agreement(9, 0, 10, True)  # the helper's top-1 is never the label
    assert measure_agreement(store, run, {run.shards[1].name}) == Agreement(5, 0, 10, True)
    assert measure_agreement(store, run, set()) is None
    made.data(0).write_bytes(b"damaged")
    assert measure_agreement(store, run, {shard.name for shard in run.shards}) == Agreement(5, 0, 10, True)


@pytest.mark.slow
def test_doubt_is_only_about_labels_that_are_explained(tmp_path: Path) -> None:
    for target in ("label", "top1"):
        (tmp_path / target).mkdir()
        made = make_run(tmp_path / target, shards=20, samples=5, target=target)
        store, run = load_run_folder(str(made.path))
        doubt = label_doubt(store, run, {shard.name for shard in run.shards})
        if target == "top1":
            assert doubt is None
        else:
            assert doubt is not None
            assert "in 0 of 80 samples" in doubt  # of 16 of the 20 shards
            assert "--labels FILE or --target top1" in doubt
