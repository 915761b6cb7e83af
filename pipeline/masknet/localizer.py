"""A localizer: taps of a classifier's trunk, and a small head that returns a mask and a box of no particular class.

Shape suffixes: B batch, C H W the network's input, K channels, h w a grid, N cells of a grid.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saltern.pipeline.masknet.network import Trunk
from saltern.pipeline.models.probe import probe
from saltern.pipeline.naming import brief
from saltern.pipeline.storage.files import publish, write
from saltern.schemas.errors import UserError

FORMAT = 1
WIDTH = 64  # channels of the head
_GROUPS = 8
_TENSORS, _REST = "localizer.safetensors", "localizer.json"


class Head(nn.Module):
    """Network from a trunk's taps at strides 8, 16 and 32 to a mask and a box.

    Each tap: 1x1 convolution to 64 channels, resized to the grid at stride 8. Their sum: two 3x3 convolutions. From
    this a 3x3 convolution makes the mask, and another, on every second cell, a box and a weight; the box of the image
    is the weighted mean of the boxes. Norms are GroupNorm, so that an image's result does not depend on its batch.

    Args:
        channels: of the taps.
        generator: of the initial weights; None = the global generator.
    """

    def __init__(self, channels: Sequence[int], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, WIDTH, 1, bias=False), nn.GroupNorm(_GROUPS, WIDTH)) for width in channels
        )
        self.context = nn.Sequential(*_block(), *_block())
        self.mask = nn.Conv2d(WIDTH, 1, 3, padding=1)
        self.box = nn.Conv2d(WIDTH, 5, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
        for last in (self.mask, self.box):  # the first masks are 0.5, the first boxes the centre
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mask's logits, logits_Bhw, on the first tap's grid, and box_B4, both float32.

        A box is x0, y0, x1, y1 as shares of the input's side, in 0..1.
        """
        grid = taps[0].shape[2:]
        resized = [
            F.interpolate(lateral(tap), size=grid, mode="bilinear", align_corners=False)
            for lateral, tap in zip(self.lateral, taps, strict=True)
        ]
        features_BKhw = self.context(F.relu(torch.stack(resized).sum(0)))
        logits_Bhw: Tensor = self.mask(features_BKhw)[:, 0].float()
        return logits_Bhw, _vote(self.box(F.avg_pool2d(features_BKhw, 2, ceil_mode=True)).float())


def _block() -> list[nn.Module]:
    return [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.GroupNorm(_GROUPS, WIDTH), nn.ReLU()]


def _vote(votes_B5hw: Tensor) -> Tensor:
    """Return the weighted mean of the cells' boxes, box_B4. Each box contains the centre of its cell."""
    height, width = votes_B5hw.shape[2:]
    y_h1 = ((torch.arange(height, device=votes_B5hw.device) + 0.5) / height)[:, None]
    x_w = (torch.arange(width, device=votes_B5hw.device) + 0.5) / width
    left, top, right, bottom = votes_B5hw[:, :4].sigmoid().unbind(1)
    edges = (x_w * (1 - left), y_h1 * (1 - top), x_w + (1 - x_w) * right, y_h1 + (1 - y_h1) * bottom)
    box_B4N = torch.stack(edges, 1).flatten(2)
    weight_BN = votes_B5hw[:, 4].flatten(1).softmax(1)
    return torch.einsum("bn,bfn->bf", weight_BN, box_B4N)


def localizer_map(mask_Bhw: Tensor, box_B4: Tensor) -> Tensor:
    """Return the map, in [0, 1], on a grid twice as fine: the mask inside of the box, 0 outside.

        map = share of the cell in the box * (1 + mask) / 2

    Inside it is at least half of what it is at most, so the rule fixed:0.5 gives the box, whatever the mask.
    """
    height, width = (2 * cells for cells in mask_Bhw.shape[1:])
    mask_BHW = F.interpolate(mask_Bhw[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
    x0_B, y0_B, x1_B, y1_B = box_B4.unbind(1)
    share_BHW = _covered(y0_B, y1_B, height)[:, :, None] * _covered(x0_B, x1_B, width)[:, None, :]
    return share_BHW * (1 + mask_BHW) / 2


def _covered(low_B: Tensor, high_B: Tensor, cells: int) -> Tensor:
    """Return how much of each of the cells from 0 to 1 lies between two edges, (B, cells), in [0, 1]."""
    start = torch.arange(cells, device=low_B.device) / cells
    overlap = torch.minimum(high_B[:, None], start + 1 / cells) - torch.maximum(low_B[:, None], start)
    return (overlap * cells).clamp(0, 1)


class Localizer:
    """A head on the taps of a classifier's trunk.

    Args:
        model: the classifier, in eval mode.
        names: of its tapped modules, finest first.
        head: made for their channels.
        detached: keep gradients from the trunk.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], head: Head, *, detached: bool = True) -> None:
        self.model, self.names, self.head = model, list(names), head
        self._trunk = Trunk(model, names, detached=detached)

    @property
    def modules(self) -> list[nn.Module]:
        """The tapped modules."""
        return self._trunk.modules

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask's logits, logits_Bhw, and box_B4, as `Head` does."""
        logits_Bhw, box_B4 = self.head(self._trunk(x_BCHW)[1])
        return logits_Bhw, box_B4

    def predict(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the map of a batch, map_Bhw, in [0, 1]; box_B4; and the classifier's logits_BK."""
        class_logits_BK, taps = self._trunk(x_BCHW)
        logits_Bhw, box_B4 = self.head(taps)
        return localizer_map(logits_Bhw.sigmoid(), box_B4), box_B4, class_logits_BK

    def trunk_weights(self, side: int | None) -> list[nn.Parameter]:
        """Return the parameters that the taps depend on: the last layers of a classifier do not take part."""
        x_BCHW = probe(self.model, side)[:1]
        with torch.enable_grad():
            taps = self._trunk(x_BCHW)[1]
            weights = [weight for weight in self.model.parameters() if weight.requires_grad]
            found = torch.autograd.grad([tap.sum() for tap in taps], weights, allow_unused=True)
        return [weight for weight, gradient in zip(weights, found, strict=True) if gradient is not None]


@dataclass(frozen=True)
class Saved:
    """A localizer on disk."""

    folder: Path
    digest: str  # sha256 of the JSON file, which has that of the tensors; hex
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # head/NAME, and trunk/NAME if the trunk was tuned

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of the head or the trunk; empty if there is none."""
        return {
            key.removeprefix(f"{name}/"): value for key, value in self.tensors.items() if key.startswith(f"{name}/")
        }


def save_localizer(folder: Path, config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write DIR/localizer.safetensors, and then DIR/localizer.json."""
    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous().clone()
        for name, part in parts.items()
        for key, value in part.items()
    }
    unfinished = folder / f".unfinished-{_TENSORS}"
    safetensors.torch.save_file(tensors, unfinished)
    publish(unfinished, folder / _TENSORS)
    content = {"format": FORMAT, "sha256": _sha256(folder / _TENSORS), **config}
    write(folder / _REST, f"{json.dumps(content, indent=1)}\n".encode())


def open_localizer(folder: Path) -> Saved:
    """Return the localizer in a folder. Raises UserError if there is none, or it is damaged."""
    if not (folder / _REST).is_file():
        raise UserError(f"{folder} holds no localizer; `saltern train-localizer RUN --out {folder}` makes one")
    try:
        raw = (folder / _REST).read_bytes()
        config = json.loads(raw)
        known, complete = config["format"] == FORMAT, _sha256(folder / _TENSORS) == config["sha256"]
        tensors = safetensors.torch.load_file(folder / _TENSORS) if complete else {}
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"the localizer in {folder} is damaged ({brief(error)}); restore it, or train it again"
        ) from error
    if not known:
        raise UserError(f"{folder / _REST} has format {config['format']}; only format {FORMAT} can be read")
    if not complete:
        raise UserError(f"{folder / _TENSORS} is not the file that {_REST} names; restore both")
    return Saved(folder.absolute(), hashlib.sha256(raw).hexdigest(), config, tensors)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
