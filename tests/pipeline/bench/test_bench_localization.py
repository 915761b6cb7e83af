"""`bench localization` reports every figure, and its peer counts the same hits."""

import numpy as np
import pytest
import torch

from saltern.pipeline.bench import localization
from saltern.pipeline.bench.figures import figures_table
from saltern.pipeline.bench.localization import LocalizationBench, measure
from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.metrics.localization.accuracy import THRESHOLDS, levels_of


def test_every_figure_is_measured() -> None:
    figures = list(measure(LocalizationBench(samples=6, peer_samples=1)))
    assert [figure.unit for figure in figures] == ["core-ms", "x", "x"]
    assert all(figure.value is not None and figure.value > 0 for figure in figures)
    for name in ("LE", "F1", "MaxBoxAcc and V2", "pointing game", "energy pointing", "bootstrap"):
        assert name in figures[0].note
    assert "6 samples" in figures_table(figures)


@pytest.mark.slow
def test_the_peer_finds_the_same_boxes() -> None:
    portion = localization._portion(2, 3)
    hits = np.unpackbits(localization._hits(portion), axis=2)[:, :, levels_of(THRESHOLDS)].astype(bool)
    for map_hw, true, hit in zip(portion.map_Bhw, portion.true, hits, strict=True):
        map_HW = upsample(torch.from_numpy(map_hw[None]), (224, 224))[0].numpy()
        for row, every, least in ((0, False, 0.5), (2, True, 0.5), (3, True, 0.7)):
            best = np.array(localization._by_thresholds(map_HW, true, every))
            np.testing.assert_array_equal(hit[row], best >= least)
    assert hits.any()
    assert not hits.all()
