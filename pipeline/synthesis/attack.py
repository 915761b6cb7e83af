"""`attack`: the least likely class put into images by perturbations, plain ones and ones guided by a saliency map.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.extract.extraction import load_method
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.extract.task import Explained, Item, Pending
from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.methods import find
from saltern.pipeline.models.passes import frozen, logits_of
from saltern.pipeline.runs.outlet import Spec, origin
from saltern.pipeline.runs.writer import Row
from saltern.pipeline.shards.decode import Decoded
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.show.grid import png
from saltern.pipeline.synthesis.perturb import PGD, perturb, unit
from saltern.schemas.attack import SIDES, attack_schema
from saltern.schemas.choices import PenaltyNorm, StepRule, check_choice
from saltern.schemas.errors import UserError
from saltern.schemas.run import ATTACK, Run, Shard
from saltern.schemas.saliency import NONFINITE, ZERO_MAP, with_metadata

_REASONS = {
    ZERO_MAP: "the map is zero everywhere: the guided perturbation is held back everywhere",
    NONFINITE: "the map or the logits are not finite",
}


class Hit(NamedTuple):
    """What one side's perturbation did; one value a sample."""

    score: Tensor
    predicted: Tensor
    fooled: Tensor
    norm: Tensor
    outside: Tensor
    image: Tensor  # uint8 (B, H, W, C)


class Attack:
    """The work of the processor on a batch: the map of the clean image, then both perturbations."""

    def __init__(self, spec: Spec, device: torch.device):
        config = spec.run.config
        given = dict(config.job_options)
        self._save = bool(given.pop("save_images"))
        self._guided = PGD(**given)
        self._plain = PGD(**{**given, "beta": 0.0, "recompute": 0})
        self._device = device
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (config.mean, config.std))
        self._model, self._method = load_method(config, device)
        self.schema = with_metadata(attack_schema(), {**origin(spec.run), "input_shape": [config.crop, config.crop]})

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> Pending:
        pending = Pending(self._device)
        pixels_BHWC = pixels_BHWC.to(self._device, non_blocking=True)
        seed_B = seed_B.to(self._device, non_blocking=True)
        image_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 255
        map_BHW = self._map(image_BCHW, None, seed_B)
        last = self._method.last
        clean_BK = last.logits_BK.float()
        hidden_B, target_B = clean_BK.argmax(1), clean_BK.argmin(1)

        def remap(image_BCHW: Tensor) -> Tensor:
            return self._map(image_BCHW, hidden_B, seed_B)

        columns = {
            "status": torch.where(last.nonfinite_B, 2, last.zero_B.long()),
            "predicted": hidden_B,
            "score": clean_BK.softmax(1).amax(1),
            "target": target_B,
        }
        with torch.inference_mode(False), torch.enable_grad(), frozen(self._model):
            for side, how in zip(SIDES, (self._plain, self._guided), strict=True):
                p_BCHW = perturb(self._logits, image_BCHW, target_B, how, map_BHW, remap)
                hit = self._judge(image_BCHW, p_BCHW, target_B, map_BHW)
                columns |= {f"{side}_{name}": value for name, value in hit._asdict().items()}
        if self._save:
            columns |= {"image": pixels_BHWC, "map": (map_BHW * 255).round().to(torch.uint8)}
        else:
            columns = {name: column for name, column in columns.items() if not name.endswith("_image")}
        return pending.send(columns)

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        return logits_of(self._model((image_BCHW - self._mean) / self._std))

    def _map(self, image_BCHW: Tensor, target_B: Tensor | None, seed_B: Tensor) -> Tensor:
        map_Bhw = self._method((image_BCHW - self._mean) / self._std, target_B, seed_B)
        assert isinstance(map_Bhw, Tensor)  # noqa: S101 - of one layer
        return unit(upsample(map_Bhw, (image_BCHW.shape[2], image_BCHW.shape[3])))

    def _judge(self, image_BCHW: Tensor, p_BCHW: Tensor, target_B: Tensor, map_BHW: Tensor) -> Hit:
        with torch.no_grad():
            probability_BK = self._logits(image_BCHW + p_BCHW).float().softmax(1)
        predicted_B = probability_BK.argmax(1)
        return Hit(
            score=probability_BK.gather(1, target_B[:, None])[:, 0],
            predicted=predicted_B,
            fooled=predicted_B == target_B,
            norm=p_BCHW.flatten(1).norm(dim=1),
            outside=(p_BCHW * (1 - map_BHW[:, None])).flatten(1).norm(dim=1),
            image=((image_BCHW + p_BCHW) * 255).round().to(torch.uint8).permute(0, 2, 3, 1),
        )

    def problem(self, sample: Sample) -> None:
        """The class that is attacked is the model's own: a label is not needed."""

    def rows(self, shard: Shard, batch: list[Item], found: Explained | None) -> list[Row]:
        rows: list[Row] = []
        at = 0
        for item in batch:
            if item.kept is not None:
                rows += item.kept
                continue
            made: dict[str, Any] = {"status": "", "error": ""}
            if item.decoded is None or found is None:
                made["status"], made["error"] = item.problem or ("", "")
            else:
                made = _attacked(item.decoded, found, at)
                at += 1
            sample = item.sample
            made |= {"key": sample.key, "shard": shard.name, "index": sample.index, "label": sample.label}
            rows.append(tuple(made.get(name) for name in self.schema.names))
        return rows


def _attacked(decoded: Decoded, found: Explained, row: int) -> dict[str, Any]:
    status = found.statuses[row]
    made: Mapping[str, Any] = {name: _value(column[row]) for name, column in found.columns.items()}
    if status == NONFINITE:
        made = {}
    else:
        made = {**made, "norm_reduction": 1 - made["guided_norm"] / made["plain_norm"] if made["plain_norm"] else None}
    return {
        **made,
        "image_height": decoded.image_height,
        "image_width": decoded.image_width,
        "geometry": list(decoded.geometry),
        "status": status,
        "error": _REASONS.get(status),
    }


def _value(value: NDArray[Any]) -> Any:
    """A number as it is, a picture as PNG."""
    return png(value) if value.ndim else value.item()


def plan(request: ExtractRequest, standing: Run | None, device: str, workers: int) -> tuple[Run, list[str]]:
    """The run that is asked for. Raises UserError where something that was asked for cannot be had."""
    if not find(request.method).needs_target:
        raise UserError(f"--guide {request.method} explains no class; give one that does, as cameras or grad-cam")
    how = PGD(**{name: value for name, value in request.job_options.items() if name != "save_images"})
    if how.steps < 1 or how.recompute < 0 or how.beta < 0 or not 0 < how.step_size <= 1 or not 0 < how.epsilon <= 1:
        raise UserError(
            "--steps must be at least 1, --recompute and --beta at least 0, --step-size and --epsilon above 0 and at "
            "most 1 (pixels are in 0..1: 12/255 is twelve levels of 8 bits)"
        )
    check_choice("--norm", how.norm, PenaltyNorm)
    check_choice("--rule", how.rule, StepRule)
    return resolve(replace(request, job=ATTACK, target="top1"), standing, device, workers)
