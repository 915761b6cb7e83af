"""Occlusion: the drop of the logit when a window of the image is filled.

Shape suffixes: B batch, S windows, C H W the network's input, K classes, h w the windows' grid.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from saltern.pipeline.methods.base import Each, Method
from saltern.pipeline.methods.gradients.paths import groups
from saltern.pipeline.models.compiling import large_parts
from saltern.pipeline.models.passes import Score, full_precision, logits_of
from saltern.schemas.errors import UserError


class Occlusion(Method):
    """Drop of the logit under a sliding filled window, averaged over a pixel's windows (Zeiler 2014, section 4.2).

    Windows start at multiples of the stride until one reaches the edge of the image; that one is cropped. The map is
    signed and has the input's size.
    """

    name = "occlusion"
    cost = "1 forward, and 1 more for each window; 169 windows at 224 pixels"
    comparable = True
    default_map_dtype = "uint8"

    window: Annotated[int, "Side of the window, pixels; it may exceed the image."] = 32
    stride: Annotated[int, "Distance between two windows, pixels."] = 16
    fill: Annotated[float, "Value of the filled pixels, normalised; 0 is the mean colour."] = 0.0
    chunk: Annotated[int, "Images in one pass."] = 64

    def prepare(self) -> None:
        for name in ("window", "stride", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"option {name} of {self.title()} must be 1 or more, not {getattr(self, name)}")
        if self.stride > self.window:
            raise UserError(
                f"option stride of {self.title()} must be at most the window ({self.window}), not {self.stride}: "
                "pixels between windows would have no value"
            )

    def trunk(self) -> Sequence[nn.Module]:
        return large_parts(self.model, [])

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        with torch.no_grad():
            logits_BK = logits_of(self.model(x_BCHW.clone()))  # an in-place first layer would change the image
            scores = self.scores(logits_BK, target_B, number)
            rows, columns = (self._starts(size) for size in x_BCHW.shape[2:])
            windows = [(top, left) for top in rows for left in columns]
            parts = [
                self._filled(x_BCHW, scores, windows[which.start : which.stop])
                for which in groups(len(windows), self.chunk, len(x_BCHW))
            ]
            maps = []
            for score, left in zip(scores, zip(*parts, strict=True), strict=True):
                drop_SB = score.of(logits_BK) - torch.cat(left)
                maps.append(self._spread(drop_SB.view(len(rows), len(columns), -1), x_BCHW))
        return maps, logits_BK, scores

    def _starts(self, size: int) -> range:
        steps = -(-max(0, size - self.window) // self.stride)
        return range(0, steps * self.stride + 1, self.stride)

    def _filled(self, x_BCHW: Tensor, scores: Sequence[Score], windows: list[tuple[int, int]]) -> list[Tensor]:
        """Return each score with each window filled, score_SB."""
        filled = torch.cat([x_BCHW] * len(windows))  # preserves the memory layout
        for filled_BCHW, (top, left) in zip(torch.split(filled, len(x_BCHW)), windows, strict=True):
            filled_BCHW[:, :, top : top + self.window, left : left + self.window] = self.fill
        logits_NK = logits_of(self.model(filled))
        return [score.repeat(len(windows)).of(logits_NK).view(len(windows), -1) for score in scores]

    def _spread(self, drop_hwB: Tensor, x_BCHW: Tensor) -> Tensor:
        """Return map_BHW, the mean drop over the windows on each pixel. Windows are rows times columns."""
        down_hH, across_wW = (self._shares(size, drop_hwB) for size in x_BCHW.shape[2:])
        with full_precision(x_BCHW.device):
            return torch.einsum("hwb,hy,wx->byx", drop_hwB, down_hH, across_wW)

    def _shares(self, size: int, like: Tensor) -> Tensor:
        """Return each window's share of the pixels along one side: 1 / coverage inside it, 0 outside."""
        starts = self._starts(size)
        start_h1 = torch.arange(starts.start, starts.stop, starts.step, device=like.device)[:, None]
        pixel_H = torch.arange(size, device=like.device)
        inside_hH = ((pixel_H >= start_h1) & (pixel_H < start_h1 + self.window)).to(like.dtype)
        return inside_hH.div_(inside_hH.sum(0))
