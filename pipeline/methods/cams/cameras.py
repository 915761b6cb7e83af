"""CAMERAS: activations and gradients averaged over sizes of the image and multiplied.

Shape suffixes: B batch, C H W the network's input, K channels, h w the layer's grid, N cells of the grids of all sizes,
T sizes.
"""

import itertools
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.methods.base import Maps, Method
from saltern.pipeline.methods.cams import upsampled
from saltern.pipeline.models.passes import full_precision, logits_of, pick_target
from saltern.pipeline.models.probe import probe
from saltern.pipeline.models.taps import Taps
from saltern.pipeline.naming import brief
from saltern.schemas.errors import UserError

_STEP, _END = 100, 1000  # pixels: increment of the sizes, and their exclusive end


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
        side = x_BCHW.shape[2] + _STEP
        try:
            with torch.no_grad():
                logits_of(self.model(F.interpolate(x_BCHW, (side, side))))
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"cameras needs a network that takes images of any size, and {type(self.model).__name__} fails at "
                f"{side} x {side} ({brief(error)}); use grad-cam, or one size: sizes=[{side - _STEP}]"
            ) from error

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        image = (x_BCHW.shape[2], x_BCHW.shape[3])
        first = min(image)
        sizes = self.sizes or list(range(first, max(first + 1, _END), _STEP))
        passes = [self._pass(x_BCHW, target_B, None)]
        passes += [self._pass(x_BCHW, target_B, (size / first)) for size in sizes[1:]]
        logits_BK = passes[0][0]
        top1_BT = torch.stack([pick_target(logits, target_B) for logits, _, _ in passes], 1)
        counts_BT = (top1_BT == top1_BT[:, :1]).float()
        share_BT = counts_BT / counts_BT.sum(1, keepdim=True)
        with full_precision(x_BCHW.device), torch.no_grad():
            A_BNK = _cells([A for _, A, _ in passes], share_BT)
            G_BNK = _cells([G for _, _, G in passes], share_BT)
            grids = tuple((A.shape[2], A.shape[3]) for _, A, _ in passes)
            size = (round(image[0] * sizes[0] / first), round(image[1] * sizes[0] / first))
            map_BHW = upsampled.product(A_BNK, G_BNK, self._plan(grids, size, A_BNK)).relu()
        return map_BHW, logits_BK, top1_BT[:, 0]

    def _pass(self, x_BCHW: Tensor, target_B: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, activations and gradients (B, K, h, w) at one size of the image, computed in chunks."""
        count = max(1, int(self.chunk / (scale or 1) ** 2))
        targets = itertools.repeat(None) if target_B is None else torch.split(target_B, count)
        parts = []
        for x_bCHW, target_b in zip(torch.split(x_BCHW, count), targets, strict=False):
            x_bCHW = x_bCHW if scale is None else self._resized(x_bCHW, scale)
            logits_bK, outputs = self._taps.forward(x_bCHW, differentiable=True)
            gradients = self._taps.gradients(logits_bK, pick_target(logits_bK, target_b), outputs)
            image = x_bCHW.shape[2:]
            A_bKhw, G_bKhw = (self._taps.grid(0, values, image) for values in (*outputs, *gradients))
            parts.append((logits_bK.detach(), A_bKhw, G_bKhw))
        logits_BK, A_BKhw, G_BKhw = (torch.cat(values) for values in zip(*parts, strict=True))
        return logits_BK, A_BKhw, G_BKhw

    def _resized(self, x_BCHW: Tensor, scale: float) -> Tensor:
        size = (round(x_BCHW.shape[2] * scale), round(x_BCHW.shape[3] * scale))
        return F.interpolate(x_BCHW, size, mode=self.interpolation, align_corners=False)

    def _plan(self, grids: tuple[tuple[int, int], ...], size: tuple[int, int], A_BNK: Tensor) -> upsampled.Plan:
        key = (*grids, size)
        if key not in self._plans:
            self._plans = {key: upsampled.plan(grids, size, A_BNK.shape[2], A_BNK.device)}
        return self._plans[key]


def _cells(maps: list[Tensor], share_BT: Tensor) -> Tensor:
    """Return all cells of the maps (B, K, h, w) of all sizes, weighted for the mean over sizes: (B, N, K)."""
    parts = [values.flatten(2).mT * share_B[:, None, None] for values, share_B in zip(maps, share_BT.T, strict=True)]
    return torch.cat(parts, 1)
