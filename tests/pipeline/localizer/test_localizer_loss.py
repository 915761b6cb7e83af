"""The loss of a localizer equals its definition, one image and one cell at a time."""

import math

import pytest
import torch

from saltern.pipeline.localizer.labels import Targets
from saltern.pipeline.localizer.losses import localizer_terms


def test_the_terms_are_means_over_images_of_what_is_known():
    draw = torch.Generator().manual_seed(4)
    logits, mask = torch.randn(3, 4, 4, generator=draw), torch.rand(3, 4, 4, generator=draw)
    known = torch.ones(3, 4, 4)
    known[0, 1:] = 0
    known[2] = 0  # nothing is known of the last image
    terms = localizer_terms(logits, Targets(mask, known))
    crosses, squares = [], []
    for image in range(3):
        p = [[1 / (1 + math.exp(-logits[image, r, c])) for c in range(4)] for r in range(4)]
        cells = [(r, c) for r in range(4) for c in range(4) if known[image, r, c]]
        total = 0.0
        for r, c in cells:
            y = float(mask[image, r, c])
            total -= y * math.log(p[r][c]) + (1 - y) * math.log(1 - p[r][c])
        crosses.append(total / len(cells) if cells else 0.0)
        squares += [(p[r + 1][c] - p[r][c]) ** 2 + (p[c][r + 1] - p[c][r]) ** 2 for r in range(3) for c in range(4)]
    assert float(terms.mask) == pytest.approx(sum(crosses) / 3, abs=1e-5)
    assert float(terms.variation) == pytest.approx(sum(squares) / len(squares), abs=1e-6)
