"""The loss of a localizer equals its definition, one image and one cell at a time."""

import math

import pytest
import torch

from saltern.pipeline.localizer.labels import Targets
from saltern.pipeline.localizer.losses import cross_entropy, mask_sums, smoothed


@pytest.fixture
def wanted() -> Targets:
    """Return labels of three images, of the last of which nothing is known."""
    known = torch.ones(3, 4, 4)
    known[0, 1:] = 0
    known[2] = 0
    return Targets(torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(3)), known)


def test_the_loss_is_a_mean_over_images_of_what_is_known(wanted):
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(4))
    crosses = []
    for image in range(3):
        cells = [(r, c) for r in range(4) for c in range(4) if wanted.known_Bgg[image, r, c]]
        total = 0.0
        for r, c in cells:
            p, y = 1 / (1 + math.exp(-logits[image, r, c])), float(wanted.mask_Bgg[image, r, c])
            total -= y * math.log(p) + (1 - y) * math.log(1 - p)
        crosses.append(total / len(cells) if cells else 0.0)
    assert float(cross_entropy(logits, wanted)) == pytest.approx(sum(crosses) / 3, abs=1e-5)


def test_labels_are_pulled_towards_the_mean_of_each_cell_s_known_labels(wanted):
    found = smoothed(wanted, mask_sums(wanted), 0.25)
    assert torch.equal(found.known_Bgg, wanted.known_Bgg)
    for r in range(4):
        for c in range(4):
            known = [float(wanted.mask_Bgg[i, r, c]) for i in range(3) if wanted.known_Bgg[i, r, c]]
            for image in range(3):
                pulled = 0.75 * float(wanted.mask_Bgg[image, r, c]) + 0.25 * sum(known) / len(known)
                assert float(found.mask_Bgg[image, r, c]) == pytest.approx(pulled, abs=1e-6)
    assert torch.equal(smoothed(wanted, mask_sums(wanted), 0.0).mask_Bgg, wanted.mask_Bgg)
