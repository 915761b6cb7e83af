"""RISE against one mask after the other, enlarged by scikit-image."""

import math

import numpy as np
import pytest
import torch
from references import agree
from skimage.transform import resize
from torch import Tensor, nn

from saltern.pipeline.methods import build
from saltern.pipeline.methods.gradients.noise import uniform
from saltern.schemas.errors import UserError

MASKS, CELLS, KEEP = 9, 3, 0.4


def naive(model: nn.Module, x_CHW: Tensor, target: int, seed: int) -> Tensor:
    """Return the map of one image: sum over masks of p(c | mask x) mask, over the number of masks and `KEEP`."""
    height, width = x_CHW.shape[1:]
    numbers = uniform(torch.tensor([seed]), MASKS * (CELLS**2 + 2))[0].numpy().reshape(MASKS, -1)
    total = np.zeros((height, width))
    for down, across, *cells in numbers:
        side = math.ceil(height / CELLS), math.ceil(width / CELLS)
        grid = (np.array(cells).reshape(CELLS, CELLS) < KEEP).astype(float)
        large = resize(grid, [(CELLS + 1) * pixels for pixels in side], order=1, mode="edge", anti_aliasing=False)
        y, x = int(down * side[0]), int(across * side[1])
        mask = large[y : y + height, x : x + width]
        with torch.no_grad():
            logits = model((x_CHW * torch.from_numpy(mask).to(x_CHW))[None])
        total += float(logits.softmax(1)[0, target]) * mask
    return torch.from_numpy(total / MASKS / KEEP)


@pytest.mark.parametrize("size", [(16, 16), (17, 23)])
def test_against_one_mask_after_the_other(size: tuple[int, int], tiny: nn.Module, images) -> None:
    model, x = tiny.double(), images(3, 24)[:, :, : size[0], : size[1]].double()
    target_B, seed_B = torch.tensor([0, 4, 2]), torch.tensor([5, 6, 2**33])
    expected = torch.stack([naive(model, *each) for each in zip(x, target_B.tolist(), seed_B.tolist(), strict=True)])
    for chunk in (1, 6, 64):
        with build("rise", model, masks=MASKS, cells=CELLS, keep=KEEP, chunk=chunk) as method:
            agree(method(x, target_B, seed_B), expected, "one mask after the other", "tiny", rtol=1e-5)


def test_the_pixel_that_the_network_reads_is_the_highest() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value_B = x[:, 0, 12, 20]
            return torch.stack([value_B, torch.zeros_like(value_B)], 1)

    with build("rise", Reads(), masks=2000, cells=4) as method:
        map_HW = method(torch.full((1, 3, 32, 32), 4.0), torch.tensor([0]))[0]
    y, x = divmod(int(map_HW.argmax()), 32)
    assert abs(y - 12) <= 4
    assert abs(x - 20) <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"masks": 0}, "masks"), ({"cells": 0}, "cells"), ({"chunk": 0}, "chunk"), ({"keep": 1.0}, "keep.*between")],
)
def test_options_are_checked(options, message, tiny: nn.Module) -> None:
    with pytest.raises(UserError, match=message):
        build("rise", tiny, **options)
