"""The loss of the masks equals results by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from saltern.pipeline.casm.algorithm.losses import entropy, mask_terms, total_variation


def case():
    draw = torch.Generator().manual_seed(0)
    logits_BK = 3 * torch.randn(5, 4, generator=draw)
    label_B = logits_BK.argmax(1)
    label_B[[0, 1]] = (label_B[[0, 1]] + 1) % 4  # two are wrong on the masked image
    right_B = torch.tensor([True, False, True, False, True])
    mask_B1HW = torch.rand(5, 1, 6, 6, generator=draw)
    return logits_BK, label_B, right_B, mask_B1HW


def test_entropy_is_in_nats():
    assert entropy(torch.zeros(1, 7)).item() == pytest.approx(math.log(7))
    assert entropy(torch.tensor([[1000.0, 0, 0]])).item() == 0
    p = torch.tensor([0.2, 0.3, 0.5])
    assert entropy(p.log()[None]).item() == pytest.approx(-sum(q * math.log(q) for q in (0.2, 0.3, 0.5)))


@pytest.mark.parametrize("score", ["entropy", "classification"])
def test_terms_by_hand(score):
    logits_BK, label_B, right_B, mask_B1HW = case()
    terms = mask_terms(logits_BK, label_B, right_B, mask_B1HW, score)
    assert terms.confused_B.tolist() == [True, False, False, False, False]  # right, AND wrong once masked
    area = mask_B1HW[0].mean().item()
    assert terms.shortfall.item() == pytest.approx((1 - area) / 5)
    if score == "entropy":
        p_BK = logits_BK.softmax(1)
        expected = sum((p_BK[n] * p_BK[n].log()).sum().item() for n in (0, 2, 4)) / 5
    else:
        expected = -F.cross_entropy(logits_BK, label_B).item()
    assert terms.score.item() == pytest.approx(expected, rel=1e-5)
    assert terms.loss(10).item() == pytest.approx(expected - 10 * (1 - area) / 5, rel=1e-5)


def test_size_presses_on_confused_images_alone():
    logits_BK, label_B, right_B, mask_B1HW = case()
    mask_B1HW.requires_grad_()
    mask_terms(logits_BK, label_B, right_B, mask_B1HW).loss(10).backward()
    assert (mask_B1HW.grad[0] > 0).all()  # descent makes it smaller
    assert not mask_B1HW.grad[1:].any()


def test_half_precision_logits_are_summed_in_full():
    logits_BK, label_B, right_B, mask_B1HW = case()
    terms = mask_terms(logits_BK.bfloat16(), label_B, right_B, mask_B1HW)
    assert terms.score.dtype == terms.shortfall.dtype == torch.float32


def test_total_variation():
    mask_B1hw = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]]]])
    assert total_variation(mask_B1hw).item() == pytest.approx((0 + 0.25) / 2 + (1 + 0.25) / 2)
    assert total_variation(torch.rand(2, 1, 1, 1)).item() == 0
