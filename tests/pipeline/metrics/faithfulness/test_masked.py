"""Masked classification equals loops and answers by hand; inpainting fills the mask and nothing else."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from naive_faithfulness import MEAN, STD, Counted, batch, naive_masked, network

from saltern.pipeline.metrics.faithfulness.masked import inpaint, masked_classification, start_inpainting
from saltern.pipeline.metrics.faithfulness.passes import black_level

CPU = torch.device("cpu")


@pytest.mark.parametrize("multiply", ["pixels", "normalised"])
def test_top1_is_that_of_loops_in_four_passes(multiply: str) -> None:
    model = Counted(network())
    x_BCHW, map_BHW, _ = batch(24)
    inpainted_BCHW, mask_BHW = x_BCHW.flip(3), map_BHW > 1
    label_B = model(x_BCHW).argmax(1)
    label_B[::6] = (label_B[::6] + 1) % 5  # some are wrong
    model.passes.clear()
    black_C11 = black_level(MEAN, STD, multiply, CPU)
    found = masked_classification(model, x_BCHW, inpainted_BCHW, mask_BHW, label_B, black_C11, batch=24)
    assert model.passes == [24] * 4
    for at, label in enumerate(label_B.tolist()):
        inside_HW = mask_BHW[at].float()
        images = {
            "whole_B": x_BCHW[at],
            "masked_in_B": naive_masked(x_BCHW[at], inside_HW, multiply),
            "masked_out_B": naive_masked(x_BCHW[at], 1 - inside_HW, multiply),
            "inpainted_B": inpainted_BCHW[at],
        }
        for name, image_CHW in images.items():
            assert bool(getattr(found, name)[at]) == (int(model(image_CHW[None]).argmax()) == label), name
    assert found.whole_B.sum() == 20
    for correct_B in found[1:]:
        assert set(correct_B.tolist()) == {True, False}


def test_a_network_that_reads_one_pixel_by_hand() -> None:
    """Class 0 where the pixel's red is above the mean."""
    logits = lambda x_BCHW: torch.stack([x_BCHW[:, 0, 1, 1], torch.zeros(len(x_BCHW))], 1)  # noqa: E731
    x_BCHW, label_B = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.int64)
    mask_BHW = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask_BHW[0, 1, 1] = True  # found; the other mask misses it
    mask_BHW[1, 2, 2] = True
    found = masked_classification(
        logits, x_BCHW, -x_BCHW, mask_BHW, label_B, black_level(MEAN, STD, "pixels", CPU), batch=1
    )
    assert [correct_B.tolist() for correct_B in found] == [[True, True], [True, False], [False, True], [False, False]]


def test_inpainting_fills_the_mask_from_the_rest() -> None:
    draw = np.random.default_rng(0)
    pixels_HWC = np.full((20, 24, 3), (10, 120, 250), dtype=np.uint8)
    mask_HW = np.zeros((20, 24), dtype=bool)
    mask_HW[6:14, 7:15] = True
    pixels_HWC[mask_HW] = draw.integers(0, 256, (64, 3))
    np.testing.assert_allclose(inpaint(pixels_HWC, mask_HW) - (10.0, 120.0, 250.0), 0, atol=2)
    noisy_HWC = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    found_HWC = inpaint(noisy_HWC, mask_HW)
    assert (found_HWC[~mask_HW] == noisy_HWC[~mask_HW]).all()
    blank_HWC = noisy_HWC * ~mask_HW[..., None]  # as the published evaluation: the masked-out image
    np.testing.assert_array_equal(found_HWC, cv2.inpaint(blank_HWC, mask_HW.astype(np.uint8), 3, cv2.INPAINT_TELEA))
    assert (inpaint(noisy_HWC, np.zeros_like(mask_HW)) == noisy_HWC).all()
    assert not inpaint(noisy_HWC, np.ones_like(mask_HW)).any()


def test_a_pool_keeps_the_order_of_the_images() -> None:
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    mask_BHW = np.random.default_rng(1).random((6, 16, 16)) < 0.4
    with ThreadPoolExecutor(2) as pool:
        futures = start_inpainting(pool, pixels_BHWC, mask_BHW)
        found_BHWC = np.stack([future.result() for future in futures])
    for found_HWC, *pair in zip(found_BHWC, pixels_BHWC, mask_BHW, strict=True):
        np.testing.assert_array_equal(found_HWC, inpaint(*pair))
