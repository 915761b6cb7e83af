"""The bootstrap that streams equals one that keeps all rows."""

import numpy as np
import pytest
from scipy import stats

from saltern.pipeline.metrics.estimate import REPLICATES, Bootstrap, draw_weights


def test_the_interval_is_that_of_scipy() -> None:
    draw = np.random.default_rng(0)
    values_N = draw.exponential(size=2000)
    sums = Bootstrap(1)
    for start in range(0, 2000, 500):
        sums.add(values_N[start : start + 500, None], draw_weights("shard", start, 500))
    (found,) = sums.estimates()
    expected = stats.bootstrap(
        (values_N,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(values_N.mean(), rel=1e-12)
    assert found.plus_minus == pytest.approx((expected.high - expected.low) / 2, rel=0.1)
    assert (found.low, found.high) == pytest.approx(
        (expected.low, expected.high), abs=0.1 * (expected.high - expected.low)
    )


def test_values_that_are_missing_do_not_count() -> None:
    values_N1 = np.array([1.0, np.nan, 3.0, np.nan])[:, None]
    sums = Bootstrap(1)
    sums.add(values_N1, draw_weights("a", 0, 4))
    (found,) = sums.estimates()
    assert (found.value, found.count) == (2.0, 2)
    assert 1 <= found.low <= found.high <= 3
    (nothing,) = Bootstrap(1).estimates()
    assert np.isnan(nothing.value)
    assert nothing.to_dict() is None


def test_draws_have_the_moments_of_a_poisson_number_and_repeat() -> None:
    weight_BN = draw_weights("a", 0, 1000)
    assert weight_BN.shape == (REPLICATES, 1000)
    assert weight_BN.mean() == pytest.approx(1, abs=0.01)
    assert weight_BN.var() == pytest.approx(1, abs=0.02)
    assert (draw_weights("a", 0, 1000) == weight_BN).all()
    assert (draw_weights("a", 512, 1000) != weight_BN).any()
    assert (draw_weights("b", 0, 1000) != weight_BN).any()
