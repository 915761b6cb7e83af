"""RISE: the mean of random masks, weighted by the probability of the class on the masked image.

Shape suffixes: B batch, S masks, C H W the network's input, K classes, L a side of the input, g cells of a mask along
a side, N random numbers of a mask.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.methods.base import Each, Method
from saltern.pipeline.methods.gradients.noise import uniform
from saltern.pipeline.methods.gradients.paths import groups
from saltern.pipeline.models.compiling import large_parts
from saltern.pipeline.models.passes import full_precision, logits_of
from saltern.schemas.errors import UserError

_SHIFTS = 2  # random numbers of a mask besides its cells: its shifts down and across


class RISE(Method):
    """Mean of random masks, weighted by the probability of the class on the masked image (Petsiuk 2018, equation 6).

    A mask is a square grid of cells, each 1 with the probability `keep`, else 0. It is enlarged (bilinear) to one cell
    more than the image, cut at a random shift of less than a cell, and multiplies the normalised image: 0 is the mean
    colour. Masks depend only on the sample's seed (`seed_B` of the call). The map has the input's size.
    """

    name = "rise"
    cost = "1 forward, and 1 more for each mask"
    default_map_dtype = "uint8"

    masks: Annotated[int, "Random masks of an image; the paper takes 8000 for ResNet-50."] = 4000
    cells: Annotated[int, "Cells of a mask along each side."] = 7
    keep: Annotated[float, "Probability of a cell to show the image."] = 0.5
    chunk: Annotated[int, "Images in one pass."] = 64

    def prepare(self) -> None:
        for name in ("masks", "cells", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"option {name} of {self.title()} must be 1 or more, not {getattr(self, name)}")
        if not 0 < self.keep < 1:
            raise UserError(f"option keep of {self.title()} must be between 0 and 1, not {self.keep}")

    def trunk(self) -> Sequence[nn.Module]:
        return large_parts(self.model, [])

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        with torch.no_grad():
            logits_BK = logits_of(self.model(x_BCHW.clone()))  # an in-place first layer would change the image
            targets = [score.class_B for score in self.scores(logits_BK, target_B, number)]
            sums = [x_BCHW.new_zeros((len(x_BCHW), *x_BCHW.shape[2:]), dtype=torch.float32) for _ in targets]
            for which in groups(self.masks, self.chunk, len(x_BCHW)):
                with full_precision(x_BCHW.device):
                    mask_BSHW = self._draw(which, x_BCHW)
                masked_BSCHW = x_BCHW[:, None] * mask_BSHW[:, :, None].to(x_BCHW.dtype)
                logits_NK = logits_of(self.model(masked_BSCHW.flatten(0, 1)))
                with full_precision(x_BCHW.device):
                    p_BSK = logits_NK.float().softmax(1).view(len(x_BCHW), len(which), -1)
                    for sum_BHW, class_B in zip(sums, targets, strict=True):
                        p_BS = p_BSK.gather(2, class_B[:, None, None].expand(-1, len(which), 1))[..., 0]
                        sum_BHW += torch.einsum("bs,bshw->bhw", p_BS, mask_BSHW)
            return [sum_BHW / (self.masks * self.keep) for sum_BHW in sums], logits_BK, targets

    def _draw(self, which: range, x_BCHW: Tensor) -> Tensor:
        """Return some of each sample's masks, mask_BSHW float32, in [0, 1]."""
        numbers = self.cells**2 + _SHIFTS
        drawn_BN = uniform(self.seed_B, numbers * len(which), numbers * which.start)
        drawn_BSN = drawn_BN.view(len(x_BCHW), len(which), numbers)
        kept_BSgg = (drawn_BSN[..., _SHIFTS:] < self.keep).float().view(*drawn_BSN.shape[:2], self.cells, -1)
        down_BSHg, across_BSWg = (
            self._enlarge(length, drawn_BSN[..., side]) for side, length in enumerate(x_BCHW.shape[2:])
        )
        return down_BSHg @ kept_BSgg @ across_BSWg.transpose(2, 3)

    def _enlarge(self, length: int, shift_BS: Tensor) -> Tensor:
        """Return the weight of each cell in each pixel along one side, weight_BSLg, after a shift in [0, 1) cells."""
        pixels = -(-length // self.cells)  # of a cell
        one_g1g = torch.eye(self.cells, device=shift_BS.device)[:, None]
        weight_Lg = F.interpolate(one_g1g, size=(self.cells + 1) * pixels, mode="linear", align_corners=False)[:, 0].T
        start_BS1 = (shift_BS * pixels).long()[..., None]
        weight_BSLg: Tensor = weight_Lg[start_BS1 + torch.arange(length, device=shift_BS.device)]
        return weight_BSLg
