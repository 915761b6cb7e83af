"""CAMs without gradients: one forward pass for each channel, which masks the image or is set to zero.

Shape suffixes: B batch, C H W the network's input, K channels, h w the layer's grid, N images of one pass,
R rows: one for each target and image.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saltern.pipeline.methods.base import Each, Method, safe_divide, weighted_sum
from saltern.pipeline.methods.cams.tail import Tail
from saltern.pipeline.models.compiling import large_parts
from saltern.pipeline.models.passes import Score, full_precision, logits_of
from saltern.pipeline.models.taps import Taps
from saltern.schemas.errors import UserError


class ScoredCAM(Method):
    """Base of the CAMs that run the network once for each channel of one layer."""

    layered = True
    comparable = True

    chunk: Annotated[int, "Images in one pass, at most; a larger batch runs one channel at a time."] = 64

    def prepare(self) -> None:
        if self.chunk < 1:
            raise UserError(f"chunk={self.chunk} of {self.title()} must be at least 1 image a pass")

    def groups(self, channels: int, batch: int) -> Iterator[slice]:
        """Yield runs of channels, each as long as one pass for all samples of the batch allows."""
        size = max(1, self.chunk // batch)
        for first in range(0, channels, size):
            yield slice(first, min(first + size, channels))


class ScoreCAM(ScoredCAM):
    """ReLU of the activations weighted by the logit of the image masked by each of them (Wang 2020, eq. 5-8).

    Each channel is enlarged (bilinear, align_corners False), scaled to [0, 1] and multiplied with the normalised
    image; a constant channel becomes 0 everywhere. The weights are the softmax of the logits over the channels.
    """

    name = "score-cam"
    cost = "1 forward, and 1 more for each channel of the layer"

    def prepare(self) -> None:
        super().prepare()
        self._taps = Taps(self.model, self.layer)

    def trunk(self) -> Sequence[nn.Module]:
        return large_parts(self.model, self._taps.modules)

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        logits_BK, (output,) = self._taps.forward(x_BCHW)
        explained = self.scores(logits_BK, target_B, number)
        A_BKhw = self._taps.grid(0, output, x_BCHW.shape[2:])
        groups = self.groups(A_BKhw.shape[1], len(x_BCHW))
        parts = [self._masked(x_BCHW, A_BKhw[:, group], explained) for group in groups]
        with full_precision(x_BCHW.device):
            scores = [torch.cat(of_target, 1) for of_target in zip(*parts, strict=True)]
            return [weighted_sum(score_BK.softmax(1), A_BKhw).relu() for score_BK in scores], logits_BK, explained

    def _masked(self, x_BCHW: Tensor, A_BGhw: Tensor, explained: Sequence[Score]) -> list[Tensor]:
        """Return each score under each mask of a group of G channels, float32 (B, G)."""
        with full_precision(x_BCHW.device):
            mask_BGHW = F.interpolate(A_BGhw, x_BCHW.shape[2:], mode="bilinear", align_corners=False)
            low_BG11, high_BG11 = mask_BGHW.amin((2, 3), keepdim=True), mask_BGHW.amax((2, 3), keepdim=True)
            mask_BGHW = safe_divide(mask_BGHW - low_BG11, high_BG11 - low_BG11).to(x_BCHW.dtype)
        masked_NCHW = (x_BCHW[:, None] * mask_BGHW[:, :, None]).flatten(0, 1)
        group = A_BGhw.shape[1]
        logits_NK = logits_of(self.model(masked_NCHW))
        return [score.repeat_each(group).of(logits_NK).view(-1, group).float() for score in explained]


class AblationCAM(ScoredCAM):
    """ReLU of the activations weighted by the share of the logit lost without each channel (Desai 2020, eq. 3-4).

    The channel is set to 0 in every cell, or in every token, the class token included. If the logit is 0, all weights
    are 0. If it is negative, a channel that lowers it has a positive weight.
    """

    name = "ablation-cam"
    cost = "1 forward, and 1 from the layer on for each of its channels"

    def prepare(self) -> None:
        super().prepare()
        self._taps = Taps(self.model, self.layer)
        self._tail = Tail(self.model, self.layer[0])

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        recording, image = self._tail.record(x_BCHW), x_BCHW.shape[2:]
        explained = self.scores(recording.logits_BK, target_B, number)
        output = recording.output
        A_BKhw = self._taps.grid(0, output, image)
        channel_K = torch.arange(A_BKhw.shape[1], device=output.device)
        dimension = self._taps.channel_dimension(0, output, image) % output.ndim
        channel = channel_K.view([-1 if axis == dimension else 1 for axis in range(output.ndim)])

        def without(number: Tensor) -> Tensor:
            return _scores(recording.logits(output.where(channel != number, 0)), explained)

        score_R1 = _scores(recording.baseline_BK, explained)[:, None]
        groups = self.groups(len(channel_K), len(x_BCHW))
        left_RK = torch.cat([self._tail.each(without, channel_K[group]) for group in groups], 1)
        weight_RK = safe_divide(score_R1 - left_RK, score_R1).float()
        with full_precision(x_BCHW.device):
            weights = torch.split(weight_RK, len(x_BCHW))
            return [weighted_sum(weight_BK, A_BKhw).relu() for weight_BK in weights], recording.logits_BK, explained


def _scores(logits_BK: Tensor, explained: Sequence[Score]) -> Tensor:
    """Return the scores, score_R, one after the other."""
    return torch.cat([score.of(logits_BK) for score in explained])
