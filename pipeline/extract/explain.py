"""One batch on the device: pixels in; maps, masks and scores out, as they are stored.

Shape suffixes: B batch, H W the network's input, h w the stored map's grid, K classes, R rows (a sample has one row for
each of its targets), N bytes.
"""

import torch
from torch import Tensor

from saltern.pipeline.extract.task import Pending
from saltern.pipeline.maps.discretize import discretize, parse_rule, upsample
from saltern.pipeline.maps.encode import CLIP_QUANTILE, pack_mask, quantise
from saltern.pipeline.methods import Method
from saltern.schemas.errors import UserError
from saltern.schemas.run import RunConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parse_target(target: str, classes: int) -> tuple[str, int]:
    """`label`, `top1`, `top:N` or `class:ID` as (kind, number). Raises UserError where it is none of them."""
    kind, colon, number = target.partition(":")
    if target in ("label", "top1"):
        return kind, 1
    if kind in ("top", "class") and colon and number.isdecimal():
        value = int(number)
        if kind == "top" and 1 <= value <= classes:
            return kind, value
        if kind == "class" and value < classes:
            return kind, value
        raise UserError(f"--target {target!r}: the model has the classes 0..{classes - 1}")
    raise UserError(f"--target {target!r} is none of label, top1, top:N, class:ID")


class Explainer:
    """A method with all that stands around it: normalisation, targets, discretization, storage.

    Args:
        method: built on its model, which is on `device`.
        config: of the run.
        device: where the model is.
    """

    def __init__(self, method: Method, config: RunConfig, device: torch.device):
        self.method, self.config, self.device = method, config, device
        self._rule = parse_rule(config.discretize)
        self._target = parse_target(config.target, config.classes)
        self._mean = torch.tensor(config.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(config.std, device=device).view(3, 1, 1)

    @property
    def clip_quantile(self) -> float | None:
        """Where the scale of stored uint8 maps ends; None where at the maximum."""
        return CLIP_QUANTILE if self.method.heavy_tailed and self.config.map_dtype == "uint8" else None

    @property
    def rows_each(self) -> int:
        """Rows of a sample."""
        return self._target[1] if self._target[0] == "top" and self.method.needs_target else 1

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor | None = None) -> Pending:
        """Explain one batch.

        Args:
            pixels_BHWC: uint8, on the host (pinned, for a GPU).
            label_B: int64, on the host; read only where the target is the label.
            seed_B: int64, on the host: what the noise of each sample follows; None = zeros.
        """
        pending = Pending(self.device)
        x_BCHW = self._normalise(pixels_BHWC.to(self.device, non_blocking=True))
        label_B = label_B.to(self.device, non_blocking=True)
        seed_B = None if seed_B is None else seed_B.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, AUTOCAST.get(self.config.precision), self.config.precision in AUTOCAST):
            maps_Bhw, targets_B, logits_BK = self._maps(x_BCHW, label_B, seed_B)
        probability_BK = logits_BK.float().softmax(1)
        parts = [self._columns(*found, probability_BK) for found in zip(maps_Bhw, targets_B, strict=True)]
        for part in parts:
            part["predicted"] = logits_BK.argmax(1)
        # Row order: sample by sample, its targets in a run.
        columns = {name: torch.stack([part[name] for part in parts], 1).flatten(0, 1) for name in parts[0]}
        return pending.send(columns)

    def _normalise(self, pixels_BHWC: Tensor) -> Tensor:
        layout = torch.contiguous_format if self.config.precision == "fp32" else torch.channels_last
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        return x_BCHW.div_(255).sub_(self._mean).div_(self._std)  # in place: a third of the time on a CPU

    def _maps(
        self, x_BCHW: Tensor, label_B: Tensor, seed_B: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[Tensor | None], Tensor]:
        """For each target: (map_Bhw, zero_B, nonfinite_B) and target_B; then the logits."""
        kind, number = self._target
        target_B: Tensor | None = {"label": label_B, "class": torch.full_like(label_B, number)}.get(kind)
        maps, targets = [self._map(x_BCHW, target_B, seed_B)], [self.method.last.target_B]
        logits_BK = self.method.last.logits_BK
        if self.rows_each > 1:
            top_BR = logits_BK.topk(number, 1).indices
            targets += top_BR.unbind(1)[1:]
            maps += [self._map(x_BCHW, target, seed_B) for target in targets[1:]]
        return maps, targets, logits_BK

    def _map(self, x_BCHW: Tensor, target_B: Tensor | None, seed_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        map_Bhw = self.method(x_BCHW, target_B if self.method.needs_target else None, seed_B)
        assert isinstance(map_Bhw, Tensor)  # noqa: S101 - of one layer
        return map_Bhw, self.method.last.zero_B, self.method.last.nonfinite_B

    def _columns(
        self, found: tuple[Tensor, Tensor, Tensor], target_B: Tensor | None, probability_BK: Tensor
    ) -> dict[str, Tensor]:
        map_Bhw, zero_B, nonfinite_B = found
        map_BHW = upsample(map_Bhw, (self.config.crop, self.config.crop))
        mask_BHW, threshold_B = discretize(map_BHW, self._rule)
        usable_B = ~(zero_B | nonfinite_B)
        kept = map_BHW if self.config.map_size == "input" else map_Bhw
        stored_Bhw, lo_B, hi_B = quantise(kept, self.config.map_dtype, heavy_tailed=self.method.heavy_tailed)
        if self.config.map_dtype == "float16":
            nonfinite_B = nonfinite_B | ~stored_Bhw.flatten(1).isfinite().all(1)
        agnostic_B = torch.full_like(zero_B, -1, dtype=torch.long)
        made = {
            "status": torch.where(nonfinite_B, 2, zero_B.long()),
            "target": agnostic_B if target_B is None else target_B,
            "score": agnostic_B.float() if target_B is None else probability_BK.gather(1, target_B[:, None])[:, 0],
            "map_lo": lo_B,
            "map_hi": hi_B,
            "mask": pack_mask(mask_BHW) * usable_B[:, None],
            "mask_threshold": threshold_B,
            "mask_area": mask_BHW.float().mean((1, 2)) * usable_B,
        }
        return made | ({"map": stored_Bhw} if self.config.save_map else {})
