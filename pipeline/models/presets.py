"""The preprocessing that weights were trained for, and a run's changes to it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError

_INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preset:
    """The preprocessing of a library's weights.

    `unusual` describes what Preprocess cannot express; "" = nothing. A run of such weights has to give its own.
    """

    preprocess: Preprocess
    unusual: str = ""


def of_torchvision(transforms: Any) -> Preset:
    """Return the preset of torchvision's `ImageClassification`."""
    (resize,), (crop,) = transforms.resize_size, transforms.crop_size  # one number each: square
    how = transforms.interpolation.value
    return Preset(Preprocess(resize, crop, False, how, tuple(transforms.mean), tuple(transforms.std)))


def of_timm(config: Mapping[str, Any]) -> Preset:
    """Return the preset of timm's `resolve_model_data_config`.

    timm's squash resizes to crop / crop_pct and then crops; Saltern's resizes to the crop, which is the same at 1.
    """
    channels, height, width = config["input_size"]
    mode, share, how = config["crop_mode"], config["crop_pct"], config["interpolation"]
    squash = mode == "squash"
    preprocess = Preprocess(
        math.floor(width / share),
        width,
        squash,
        how if how in _INTERPOLATIONS else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    expressed = (
        channels == 3
        and height == width
        and (mode == "center" or (squash and share == 1))
        and share <= 1
        and how in _INTERPOLATIONS
    )
    text = f"crop_mode {mode}, crop_pct {share:g}, input {channels} x {height} x {width}, {how}"
    return Preset(preprocess, "" if expressed else text)


def of_open_clip(config: Mapping[str, Any]) -> Preset:
    """Return the preset of an image tower's `preprocess_cfg`."""
    size, mode, how = config["size"], config["resize_mode"], config["interpolation"]
    height, width = (size, size) if isinstance(size, int) else size
    squash = mode == "squash"
    preprocess = Preprocess(
        width,
        width,
        squash,
        how if how in _INTERPOLATIONS else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    expressed = height == width and mode in ("shortest", "squash") and how in _INTERPOLATIONS
    return Preset(preprocess, "" if expressed else f"resize_mode {mode}, input {height} x {width}, {how}")


def adapt(
    preset: Preset,
    *,
    resize: int | None = None,
    crop: int | None = None,
    squash: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocess:
    """Return the preset with a run's changes; None keeps the preset's value.

    Raises:
        UserError: an impossible value, an option without effect, or a preset that must be replaced and is not.
    """
    usual = preset.preprocess
    if preset.unusual and not (crop and (resize or squash)):
        raise UserError(
            f"the weights' preset ({preset.unusual}) is not one that Saltern has: give the "
            "nearest yourself, --crop N with --resize N or --squash (train-casm: --side N)"
        )
    squash = (usual.squash and not preset.unusual) if squash is None else squash
    if squash and resize:
        raise UserError(f"--resize {resize} has no effect on squashed images; give --no-squash, or leave it out")
    wanted = replace(
        usual,
        resize=resize or usual.resize,
        crop=crop or usual.crop,
        squash=squash,
        mean=tuple(usual.mean if mean is None else mean),
        std=tuple(usual.std if std is None else std),
    )
    if wanted.crop < 1 or (not squash and wanted.resize < wanted.crop):
        raise UserError(f"--resize {wanted.resize} is smaller than --crop {wanted.crop}: the crop would be padded")
    check_colours(wanted)
    return wanted


def check_colours(preprocess: Preprocess) -> None:
    """Raise UserError if mean or standard deviation cannot be those of three channels in 0..1."""
    for name, values, least in (("mean", preprocess.mean, 0.0), ("std", preprocess.std, math.ulp(0.0))):
        text = ",".join(f"{value:g}" for value in values)
        if len(values) != 3:
            raise UserError(f"--{name} takes three numbers, for R,G,B, not {text!r}")
        if not all(least <= value <= 1 for value in values):
            raise UserError(
                f"--{name} {text}: pixels are scaled to 0..1 first, so each number must be "
                f"{'in 0..1' if least == 0 else 'larger than 0 and at most 1'}; divide values for 0..255 by 255"
            )
