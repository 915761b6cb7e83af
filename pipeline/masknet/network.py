"""The mask network: taps at the stages of a classifier, and a small decoder on top (Zolna 2020, fig. 2).

Shape suffixes: B batch, C H W the network's input, K channels of a tap (classes of logits), h w the stem tap's grid.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saltern.pipeline.models.outputs import tensor_of
from saltern.pipeline.models.passes import logits_of

WIDTH = 64  # channels of every stage in the decoder


class Trunk:
    """A classifier that returns its logits and the outputs of its stages from one forward pass.

    Args:
        names: of `find_stages`.
        detached: return taps without gradient, for a classifier that the decoder must not train.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, detached: bool = True) -> None:
        self.model = model
        self._modules = [(name, model.get_submodule(name)) for name in names]
        self._detached = detached

    @property
    def modules(self) -> list[nn.Module]:
        """The stages."""
        return [module for _, module in self._modules]

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits_BK and the taps (B, K, h, w), stem first.

        A tap includes the effect of a following in-place activation (the last one of DenseNet).
        """
        kept: dict[str, Tensor] = {}

        def keeping(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                kept[name] = tensor_of(output, name)

            return keep

        handles = [module.register_forward_hook(keeping(name)) for name, module in self._modules]
        try:
            logits_BK = logits_of(self.model(x_BCHW))
        finally:
            for handle in handles:
                handle.remove()
        taps = [kept[name] for name, _ in self._modules]
        return logits_BK, [tap.detach() for tap in taps] if self._detached else taps


class Decoder(nn.Module):
    """Network from taps to a mask.

    Each stage: 1x1 convolution to 64 channels, BatchNorm, ReLU, resized to the stem's grid. All of them and the stem:
    3x3 convolution, sigmoid.

    Args:
        channels: of the taps, stem first.
        generator: of the initial weights; None = the global generator.
        scale: of the last convolution's initial weights; with 1, as published, the first masks are nearly binary.
    """

    def __init__(self, channels: Sequence[int], generator: torch.Generator | None = None, scale: float = 1.0) -> None:
        super().__init__()
        stem, *stages = channels
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))
            for width in stages
        )
        self.last = nn.Conv2d(stem + WIDTH * len(stages), 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5, generator=generator)
        self.last.weight.detach().mul_(scale)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Return mask_B1hw, float32, in [0, 1], on the stem's grid: a quarter of the input's side; 1 = removed."""
        return self.logits(taps).sigmoid()

    def logits(self, taps: Sequence[Tensor]) -> Tensor:
        """Return the mask before the sigmoid, float32."""
        grid = taps[0].shape[2:]
        resized = [
            F.interpolate(stage(tap), size=grid, mode="bilinear", align_corners=False)
            for stage, tap in zip(self.stages, taps[1:], strict=True)
        ]
        # Half precision would round masks near 1 to 1, where the sigmoid has no slope.
        logits_B1hw: Tensor = self.last(torch.cat([taps[0], *resized], 1))
        return logits_B1hw.float()


def enlarge(mask_B1hw: Tensor, image: Sequence[int]) -> Tensor:
    """Return mask_B1HW: the mask on the pixels of the input, by the nearest cell."""
    return F.interpolate(mask_B1hw, size=tuple(image), mode="nearest")
