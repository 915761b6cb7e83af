"""The losses of a localizer equal their definitions, one image and one cell at a time."""

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou

from saltern.pipeline.localizer.labels import Targets
from saltern.pipeline.localizer.losses import giou, localizer_terms


def drawn_boxes(count: int, seed: int) -> torch.Tensor:
    edges = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values
    return edges.reshape(count, 4)


def naive_giou(one: list[float], other: list[float]) -> float:
    wide = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    high = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    shared = wide * high
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    hull = (max(one[2], other[2]) - min(one[0], other[0])) * (max(one[3], other[3]) - min(one[1], other[1]))
    return shared / union - (hull - union) / hull


def test_giou_is_its_definition_and_torchvision_s():
    one, other = drawn_boxes(40, 1), drawn_boxes(40, 2)
    found = giou(one, other)
    assert found.tolist() == pytest.approx(
        [naive_giou(a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True)], abs=1e-5
    )
    torch.testing.assert_close(found, generalized_box_iou(one, other).diagonal(), rtol=1e-5, atol=1e-6)
    assert giou(one, one).tolist() == pytest.approx([1.0] * 40)


def test_the_terms_are_means_over_images_of_what_is_known():
    draw = torch.Generator().manual_seed(4)
    logits, mask = torch.randn(3, 4, 4, generator=draw), torch.rand(3, 4, 4, generator=draw)
    known = torch.ones(3, 4, 4)
    known[0, 1:] = 0
    known[2] = 0  # nothing is known of the last image
    box, wanted = drawn_boxes(3, 5), drawn_boxes(3, 6)
    terms = localizer_terms(logits, box, Targets(mask, known, wanted, torch.tensor([1.0, 0.0, 1.0])))
    crosses = []
    for image in range(3):
        cells = [(r, c) for r in range(4) for c in range(4) if known[image, r, c]]
        total = 0.0
        for r, c in cells:
            p, y = 1 / (1 + math.exp(-logits[image, r, c])), float(mask[image, r, c])
            total -= y * math.log(p) + (1 - y) * math.log(1 - p)
        crosses.append(total / len(cells) if cells else 0.0)
    assert float(terms.mask) == pytest.approx(sum(crosses) / 3, abs=1e-5)
    l1 = [sum(abs(a - b) for a, b in zip(box[i].tolist(), wanted[i].tolist(), strict=True)) / 4 for i in (0, 2)]
    assert float(terms.l1) == pytest.approx(sum(l1) / 3, abs=1e-6)
    apart = [1 - naive_giou(box[i].tolist(), wanted[i].tolist()) for i in (0, 2)]
    assert float(terms.giou) == pytest.approx(sum(apart) / 3, abs=1e-5)


def test_boxes_without_area_have_finite_losses_and_gradients():
    box = torch.zeros(2, 4, requires_grad=True)
    terms = localizer_terms(
        torch.zeros(2, 1, 1), box, Targets(*(torch.zeros(2, 1, 1),) * 2, torch.zeros(2, 4), torch.ones(2))
    )
    (terms.l1 + terms.giou).backward()
    assert box.grad is not None
    assert bool(box.grad.isfinite().all())
