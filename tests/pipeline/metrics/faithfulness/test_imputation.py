"""Imputed pixels solve the system of ROAD, as pytorch-grad-cam's direct solver does, whatever the batch."""

import pytest
import torch
from naive_faithfulness import batch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from torch import Tensor

from saltern.pipeline.metrics.faithfulness.imputation import _doubled, _halved, impute

pytestmark = pytest.mark.slow


def gaps(height: int, width: int) -> Tensor:
    """Return removed_BHW: scattered, a hole, all but one corner, nothing, half of the image, a frame."""
    removed = torch.zeros(6, height, width, dtype=torch.bool)
    removed[0] = torch.rand(height, width, generator=torch.Generator().manual_seed(3)) < 0.8
    removed[1, height // 4 : -height // 4, width // 4 : -width // 4] = True
    removed[2] = True
    removed[2, 0, 0] = False
    removed[4, height // 2 :] = True
    removed[5] = True
    removed[5, 2:-2, 2:-2] = False
    return removed


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # the peer gives tensors to numpy
@pytest.mark.parametrize(("height", "width"), [(32, 32), (23, 38), (9, 5)])
def test_imputed_pixels_are_those_of_a_direct_solver(height: int, width: int) -> None:
    x_BCHW = torch.randn(6, 3, height, width, generator=torch.Generator().manual_seed(0)).cumsum(2) / 3
    removed_BHW = gaps(height, width)
    found_BCHW = impute(x_BCHW, removed_BHW, iterations=14)
    solve = NoisyLinearImputer(noise=0)
    for at in (0, 1, 2, 4, 5):
        expected = solve(x_BCHW[at], (~removed_BHW[at]).float())
        torch.testing.assert_close(found_BCHW[at], expected, rtol=0, atol=3e-4)
        usual = impute(x_BCHW, removed_BHW)[at]  # with the iterations of the metric
        torch.testing.assert_close(usual, expected, rtol=0, atol=3e-3)
    assert torch.equal(found_BCHW.movedim(1, -1)[~removed_BHW], x_BCHW.movedim(1, -1)[~removed_BHW])
    assert torch.equal(found_BCHW[3], x_BCHW[3])


def test_a_linear_ramp_is_continued_and_removed_values_do_not_count() -> None:
    ramp_HW = torch.arange(16.0).expand(16, 16)
    removed_HW = torch.zeros(16, 16, dtype=torch.bool)
    removed_HW[4:12, 3:13] = True
    x_CHW = ramp_HW.masked_fill(removed_HW, torch.nan)[None]
    found_CHW = impute(x_CHW[None], removed_HW[None], iterations=14)[0]
    torch.testing.assert_close(found_CHW[0], ramp_HW, rtol=0, atol=1e-3)


def test_without_any_pixel_left_nothing_is_nan() -> None:
    x_BCHW, _, _ = batch(1)
    assert impute(x_BCHW, torch.ones(1, 12, 12, dtype=torch.bool)).eq(0).all()


def test_a_sample_does_not_depend_on_its_batch_or_on_autocast() -> None:
    x_BCHW = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    removed_BHW = gaps(24, 24)
    together = impute(x_BCHW, removed_BHW)
    with torch.autocast("cpu", torch.bfloat16):
        single = torch.cat([impute(x_BCHW[at, None], removed_BHW[at, None]) for at in range(6)])
    torch.testing.assert_close(single, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [8, 7, 3])
def test_restriction_is_the_transpose_of_prolongation(length: int) -> None:
    coarse = (length + 1) // 2
    for dim in (2, 3):
        up = torch.stack(
            [_doubled(row.view(1, 1, -1, 1).transpose(2, dim), dim, length).flatten() for row in torch.eye(coarse)]
        )
        down = torch.stack(
            [_halved(row.view(1, 1, -1, 1).transpose(2, dim), dim).flatten() for row in torch.eye(length)]
        )
        torch.testing.assert_close(up, down.T)
        torch.testing.assert_close(up.sum(0), torch.ones(length))
