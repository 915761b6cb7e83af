"""CAMERAS: activations and gradients averaged over sizes of the image and multiplied.

Shape suffixes: B batch, C H W the network's input, K channels, h w the layer's grid, N cells of the grids of all sizes,
T sizes.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.device import device_lost, out_of_memory
from saltern.pipeline.methods.base import Each, Method
from saltern.pipeline.methods.cams import upsampled
from saltern.pipeline.models.passes import Score, full_precision, logits_of
from saltern.pipeline.models.probe import probe
from saltern.pipeline.models.taps import Taps
from saltern.pipeline.naming import brief
from saltern.schemas.errors import UserError

_STEP, _END = 100, 1000  # pixels: increment of the sizes, and their exclusive end


class _Pass(NamedTuple):
    """The results of one size of the images."""

    logits_BK: Tensor
    A_BKhw: Tensor
    gradients: list[Tensor]  # (B, K, h, w) of each score
    scores: list[Score]


class CAMERAS(Method):
    """Mean activation times mean gradient over many sizes of the image, summed over channels (Jalwana 2021, alg. 1).

    The map has the first size. If targets are given, all sizes count. Otherwise each size differentiates its own
    top-1 class, and the sizes whose top-1 equals that of the first size count, for each image separately. The first
    pass takes the input unchanged. The further sizes resize the normalised input, not antialiased: the paper says
    bilinear, its published code uses bicubic.
    """

    name = "cameras"
    cost = "1 forward and backward for each size; 8 sizes at 224 pixels cost as much as 61"
    layered = True
    comparable = True
    default_map_dtype = "uint8"

    sizes: Annotated[list[int] | None, "Shorter sides, pixels; None = the input's, then 100 more each, below 1000."] = (
        None
    )
    interpolation: Annotated[Literal["bicubic", "bilinear"], "How the input is resized to the further sizes."] = (
        "bicubic"
    )
    chunk: Annotated[int, "Images in one pass at the input's size; fewer at larger sizes, of the same total area."] = 64

    def prepare(self) -> None:
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise UserError(f"sizes of cameras: at least one, each at least 1 pixel, not {self.sizes}")
        if self.chunk < 1:
            raise UserError(f"chunk of cameras is {self.chunk}: at least one image is needed")
        self._taps = Taps(self.model, self.layer)
        self._plans: dict[tuple[tuple[int, ...], ...], upsampled.Plan] = {}
        if self.sizes is None or len(self.sizes) > 1:
            self._check_other_size()

    def _check_other_size(self) -> None:
        x_BCHW = probe(self.model, self.input_side)[:1]
        image = x_BCHW.shape[2:]
        height, width = (round(side * (1 + _STEP / min(image))) for side in image)
        try:
            with torch.no_grad():
                logits_of(self.model(F.interpolate(x_BCHW, (height, width))))
        except (RuntimeError, AssertionError, ValueError) as error:
            if device_lost(error) or out_of_memory(error):
                raise
            raise UserError(
                f"cameras needs a network that takes images of any size, and {type(self.model).__name__} fails at "
                f"{height} x {width} ({brief(error)}); use grad-cam, or one size: sizes=[{min(image)}]"
            ) from error

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        image = (x_BCHW.shape[2], x_BCHW.shape[3])
        first = min(image)
        sizes = self.sizes or list(range(first, max(first + 1, _END), _STEP))
        passes = [self._pass(x_BCHW, None, lambda logits, part: self.scores(logits, _part(target_B, part), number))]
        scores = passes[0].scores

        def again(logits_bK: Tensor, part: slice) -> list[Score]:
            own, *rest = (score.part(part) for score in scores)
            return [own if target_B is not None else replace(own, class_B=logits_bK.argmax(1)), *rest]

        passes += [self._pass(x_BCHW, size / first, again) for size in sizes[1:]]
        grids = tuple((size.A_BKhw.shape[2], size.A_BKhw.shape[3]) for size in passes)
        output = (round(image[0] * sizes[0] / first), round(image[1] * sizes[0] / first))
        maps = []
        for index in range(number):
            target_BT = torch.stack([size.scores[index].class_B for size in passes], 1)
            counts_BT = (target_BT == target_BT[:, :1]).float()
            share_BT = counts_BT / counts_BT.sum(1, keepdim=True)
            with full_precision(x_BCHW.device), torch.no_grad():
                A_BNK = _cells([size.A_BKhw for size in passes], share_BT)
                G_BNK = _cells([size.gradients[index] for size in passes], share_BT)
                maps.append(upsampled.product(A_BNK, G_BNK, self._plan(grids, output, A_BNK)).relu())
        return maps, passes[0].logits_BK, scores

    def _pass(self, x_BCHW: Tensor, scale: float | None, choose: Callable[[Tensor, slice], list[Score]]) -> _Pass:
        """Explain one size of the images, in chunks.

        Args:
            scale: of the size; None = the images as they are.
            choose: returns the scores of a chunk from its logits and its place in the batch.
        """
        count = max(1, int(self.chunk / (scale or 1) ** 2))
        parts: list[tuple[Tensor, ...]] = []
        scores: list[list[Score]] = []
        for start in range(0, len(x_BCHW), count):
            chunk = slice(start, start + count)
            x_bCHW = x_BCHW[chunk] if scale is None else self._resized(x_BCHW[chunk], scale)
            logits_bK, outputs = self._taps.forward(x_bCHW, differentiable=True)
            scores.append(choose(logits_bK, chunk))
            image = x_bCHW.shape[2:]
            each = self._taps.gradients(logits_bK, scores[-1], outputs)
            gradients = [self._taps.grid(0, gradient, image) for (gradient,) in each]
            parts.append((logits_bK.detach(), self._taps.grid(0, outputs[0], image), *gradients))
        logits_BK, A_BKhw, *gradients = (torch.cat(values) for values in zip(*parts, strict=True))
        return _Pass(logits_BK, A_BKhw, gradients, [Score.joined(each) for each in zip(*scores, strict=True)])

    def _resized(self, x_BCHW: Tensor, scale: float) -> Tensor:
        size = (round(x_BCHW.shape[2] * scale), round(x_BCHW.shape[3] * scale))
        return F.interpolate(x_BCHW, size, mode=self.interpolation, align_corners=False)

    def _plan(self, grids: tuple[tuple[int, int], ...], size: tuple[int, int], A_BNK: Tensor) -> upsampled.Plan:
        key = (*grids, size)
        if key not in self._plans:
            self._plans = {key: upsampled.plan(grids, size, A_BNK.shape[2], A_BNK.device)}
        return self._plans[key]


def _part(target_B: Tensor | None, part: slice) -> Tensor | None:
    return None if target_B is None else target_B[part]


def _cells(maps: list[Tensor], share_BT: Tensor) -> Tensor:
    """Return all cells of the maps (B, K, h, w) of all sizes, weighted for the mean over sizes: (B, N, K)."""
    parts = [values.flatten(2).mT * share_B[:, None, None] for values, share_B in zip(maps, share_BT.T, strict=True)]
    return torch.cat(parts, 1)
