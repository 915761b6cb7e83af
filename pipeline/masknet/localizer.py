"""A localizer: taps of a classifier's trunk, and a small head that returns a mask of no particular class.

Shape suffixes: B batch, C H W the network's input, K channels, h w a grid.
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
    """Network from a trunk's taps at strides 8, 16 and 32 to a mask.

    Each tap: 1x1 convolution to 64 channels. Those at strides 16 and 32, on the grid at stride 16: their sum, and two
    3x3 convolutions. That and the tap at stride 8, on its grid: their sum, and a 3x3 convolution to the mask. Norms are
    GroupNorm, so that an image's result does not depend on its batch.

    Args:
        channels: of the taps, finest first.
        generator: of the initial weights; None = the global generator.
    """

    def __init__(self, channels: Sequence[int], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, WIDTH, 1, bias=False), nn.GroupNorm(_GROUPS, WIDTH)) for width in channels
        )
        self.context = nn.Sequential(*_block(), *_block())
        self.mask = nn.Conv2d(WIDTH, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
        nn.init.zeros_(self.mask.weight)  # the first masks are 0.5
        nn.init.zeros_(self.mask.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Return the mask's logits, logits_Bhw, float32, on the first tap's grid."""
        fine, middle, coarse = (lateral(tap) for lateral, tap in zip(self.lateral, taps, strict=True))
        context = self.context(F.relu(middle + _resized(coarse, middle)))
        logits_Bhw: Tensor = self.mask(F.relu(fine + _resized(context, fine)))[:, 0]
        return logits_Bhw.float()


def _block() -> list[nn.Module]:
    return [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.GroupNorm(_GROUPS, WIDTH), nn.ReLU()]


def _resized(x_BKhw: Tensor, like_BKhw: Tensor) -> Tensor:
    return F.interpolate(x_BKhw, size=like_BKhw.shape[2:], mode="bilinear", align_corners=False)


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

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Return the mask's logits, logits_Bhw, as `Head` does."""
        logits_Bhw: Tensor = self.head(self._trunk(x_BCHW)[1])
        return logits_Bhw

    def predict(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask, map_Bhw, in [0, 1], on a grid of a quarter of the input's side; and the class logits_BK."""
        class_logits_BK, taps = self._trunk(x_BCHW)
        logits_B1hw = F.interpolate(self.head(taps)[:, None], scale_factor=2, mode="bilinear", align_corners=False)
        return logits_B1hw[:, 0].sigmoid(), class_logits_BK

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
        config["model"], config["weights_digest"]  # needed later
        known, complete = config["format"] == FORMAT, _sha256(folder / _TENSORS) == config["sha256"]
        tensors = safetensors.torch.load_file(folder / _TENSORS) if complete else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(
            f"the localizer in {folder} is damaged ({brief(error)}); restore it, or train it again"
        ) from error
    if not known:
        raise UserError(f"{folder / _REST} has format {config['format']!r}; only format {FORMAT} can be read")
    if not complete:
        raise UserError(f"{folder / _TENSORS} is not the file that {_REST} names; restore both")
    return Saved(folder.absolute(), hashlib.sha256(raw).hexdigest(), config, tensors)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
