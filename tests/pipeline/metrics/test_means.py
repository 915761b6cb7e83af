"""The estimates that stream equal those that keep all rows."""

import numpy as np
import pytest
from scipy import stats

from saltern.pipeline.metrics.estimate import Means


def test_the_interval_is_that_of_scipy() -> None:
    draw = np.random.default_rng(0)
    values_N = draw.exponential(size=2000)
    sums = Means(1)
    for start in range(0, 2000, 500):
        sums.add(values_N[start : start + 500, None])
    (found,) = sums.estimates()
    expected = stats.bootstrap(
        (values_N,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(values_N.mean(), rel=1e-6)
    assert found.std == pytest.approx(values_N.std(), rel=1e-5)
    assert found.plus_minus == pytest.approx((expected.high - expected.low) / 2, rel=0.1)
    assert (found.low, found.high) == pytest.approx(
        (expected.low, expected.high), abs=0.1 * (expected.high - expected.low)
    )


def test_values_that_are_missing_do_not_count() -> None:
    values_N1 = np.array([1.0, np.nan, 3.0, np.nan])[:, None]
    sums = Means(1)
    sums.add(values_N1)
    (found,) = sums.estimates()
    assert (found.value, found.count, found.std) == (2.0, 2, 1.0)
    assert 1 <= found.low <= found.high <= 3
    (nothing,) = Means(1).estimates()
    assert np.isnan(nothing.value)
    assert nothing.to_dict() is None
