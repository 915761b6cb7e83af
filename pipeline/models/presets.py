"""The preprocessing that weights were trained for, and a run's changes to it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side

_INTERPOLATIONS = ("bilinear", "bicubic")
# Image processors of transformers that resize, crop and normalise, and nothing else.
_HF_FAMILIES = (
    *("ViT", "Bit", "CLIP", "Siglip", "DeiT", "Beit", "ConvNext", "MobileNetV1", "MobileNetV2", "Segformer", "Pvt"),
)
_HF_WARPED = 384  # side from which ConvNext's squashes


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
        math.floor(min(height, width) / share),
        (height, width),
        squash,
        how if how in _INTERPOLATIONS else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    expressed = (
        channels == 3
        and (height == width or share == 1)  # else timm rounds both sides of the frame
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
        min(height, width),
        (height, width),
        squash,
        how if how in _INTERPOLATIONS else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    expressed = mode in ("shortest", "squash") and how in _INTERPOLATIONS
    return Preset(preprocess, "" if expressed else f"resize_mode {mode}, input {height} x {width}, {how}")


def of_hf(kind: str, values: Mapping[str, Any]) -> Preset:
    """Return the preset of an image processor of transformers.

    Args:
        kind: its class, such as ViTImageProcessor; those with steps of their own are unusual.
        values: of its attributes.
    """
    size, cut, resample = values.get("size") or {}, values.get("crop_size") or {}, values.get("resample")
    short, crops = size.get("shortest_edge"), bool(values.get("do_center_crop"))
    how = {2: "bilinear", 3: "bicubic"}.get(-1 if resample is None else int(resample), "")
    colours = (values["image_mean"], values["image_std"]) if values.get("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    family, squash = kind.partition("ImageProcessor")[0], False
    expressed = family in _HF_FAMILIES and bool(how) and values.get("do_resize", False)
    expressed = expressed and abs(values.get("rescale_factor", 0) - 1 / 255) < 1e-9 and values.get("do_rescale", False)
    if short and family == "ConvNext":  # crops small images, and squashes large ones
        resize, crop, squash = int(short / values["crop_pct"]), (short, short), short >= _HF_WARPED
    elif short:
        resize, crop = short, (cut.get("height", short), cut.get("width", short))
        expressed = expressed and crops and min(crop) <= short and crop[0] == crop[1]
    else:
        crop = size.get("height", 224), size.get("width", 224)
        resize, squash = min(crop), True
        expressed = expressed and {"height", "width"} == set(size) and (not crops or cut == size)
    preprocess = Preprocess(resize, crop, squash, how or "bicubic", *map(tuple, colours))
    text = f"{kind}, size {dict(size)}, crop {dict(cut) if crops else 'none'}, resample {resample}"
    return Preset(preprocess, "" if expressed else text)


def adapt(
    preset: Preset,
    *,
    resize: int | None = None,
    crop: Side | None = None,
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
            f"the preprocessing of these weights cannot be taken over ({preset.unusual}): give the "
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
    if min(wanted.shape) < 1 or (not squash and wanted.resize < min(wanted.shape)):
        shown = "x".join(map(str, dict.fromkeys(wanted.shape)))
        given = f"--resize {resize}" if resize else f"the weights' resize, {usual.resize},"
        fix = f"; give --resize {min(wanted.shape)} or more" if min(wanted.shape) > 0 else ""
        raise UserError(f"{given} is smaller than --crop {shown}: the crop would be padded{fix}")
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
