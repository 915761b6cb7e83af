"""The job `attack`: perturbs images until the model sees their least likely class, by plain and by map-guided PGD.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.engine.conduct import Job
from saltern.pipeline.extract.batch import Batch
from saltern.pipeline.extract.extraction import load_method
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import MethodRequest, find_inputs, method_fields
from saltern.pipeline.extract.rows import Rows
from saltern.pipeline.extract.task import STATUSES, Explained, Pending, Task
from saltern.pipeline.extract.tryout import is_proven, try_gradient, try_method
from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.methods import find
from saltern.pipeline.models.passes import frozen, logits_of
from saltern.pipeline.runs.begin import new_run
from saltern.pipeline.runs.columns import numbers
from saltern.pipeline.runs.datafile import data_schema
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.show.grid import png
from saltern.pipeline.synthesis.attack_report import close
from saltern.pipeline.synthesis.perturb import perturb, unit
from saltern.schemas.attack import SIDES
from saltern.schemas.choices import PenaltyNorm, StepRule, check_choice
from saltern.schemas.config import PGD, AttackConfig
from saltern.schemas.errors import UserError
from saltern.schemas.run import Run, Shard
from saltern.schemas.saliency import NONFINITE, ZERO_MAP

_REASONS = {
    ZERO_MAP: "the map is zero everywhere: the guided perturbation is held back everywhere",
    NONFINITE: "the map or the logits are not finite",
}


@dataclass(frozen=True)
class AttackRequest(MethodRequest):
    """Options of `attack`; `method` is the guide."""

    pgd: PGD = PGD(steps=80, step_size=1.5 / 255, epsilon=12 / 255, beta=50.0)  # noqa: RUF009 - frozen
    save_images: bool = True


def attacking(request: AttackRequest) -> Job:
    """Return the job of `saltern attack`."""
    return Job(partial(plan, request), partial(Processor, task=Attack), close)


def plan(request: AttackRequest, existing: Run | None, device: str, workers: int) -> tuple[Run, list[str]]:
    """Return the requested run, as extract.request.resolve does. Raises UserError if an option is invalid."""
    if not find(request.method).needs_target:
        raise UserError(f"--guide {request.method} explains no class; give one that does, as cameras or grad-cam")
    _check(request.pgd)
    inputs = find_inputs(request, existing)
    classifier = inputs.classifier
    fields, method = method_fields(request, classifier, existing, device, workers)
    config = AttackConfig(**fields, pgd=request.pgd, save_images=request.save_images)
    if not is_proven(config, existing):
        try_gradient(method.model, config.preprocess.crop)
        try_method(method, config)
    method.close()
    return new_run(config, inputs.shards, classifier.class_names), inputs.hints


def _check(how: PGD) -> None:
    if how.recompute > 0 and how.beta == 0:
        raise UserError("--recompute has no effect with --beta 0, as the map is not used; leave one of them out")
    if how.steps < 1 or how.recompute < 0 or how.beta < 0 or not 0 < how.step_size <= 1 or not 0 < how.epsilon <= 1:
        raise UserError(
            "--steps must be at least 1, --recompute and --beta at least 0, --step-size and --epsilon above 0 and at "
            "most 1 (pixels are in 0..1: 12/255 is twelve levels of 8 bits)"
        )
    check_choice("--norm", how.norm, PenaltyNorm)
    check_choice("--rule", how.rule, StepRule)


class Hit(NamedTuple):
    """Results of one side's perturbation, one value a sample."""

    score: Tensor
    predicted: Tensor
    fooled: Tensor
    norm: Tensor
    outside: Tensor
    image: Tensor  # uint8 (B, H, W, C)


class Attack(Task):
    """The task of `attack`: makes the map of the clean image, then both perturbations."""

    def __init__(self, spec: Spec, device: torch.device):
        config = spec.run.config_of(AttackConfig)
        self._save, self._device = config.save_images, device
        self._sides = {"plain": replace(config.pgd, beta=0.0, recompute=0), "guided": config.pgd}
        how = config.preprocess
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (how.mean, how.std))
        self._model, self._method = load_method(config, device)
        self.schema = data_schema(spec.run, {})

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> Pending:
        pending = Pending(self._device)
        pixels_BHWC = pixels_BHWC.to(self._device, non_blocking=True)
        seed_B = seed_B.to(self._device, non_blocking=True)
        image_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 255
        map_BHW = self._map(image_BCHW, None, seed_B)
        last = self._method.last
        clean_BK = last.logits_BK.float()
        hidden_B, target_B = clean_BK.argmax(1), clean_BK.argmin(1)
        columns = {
            "status": torch.where(last.nonfinite_B, STATUSES.index(NONFINITE), last.zero_B.long()),
            "predicted": hidden_B,
            "score": clean_BK.softmax(1).amax(1),
            "target": target_B,
        }
        with torch.inference_mode(False), torch.enable_grad(), frozen(self._model):
            for side in SIDES:
                p_BCHW = perturb(
                    self._logits,
                    image_BCHW,
                    target_B,
                    self._sides[side],
                    map_BHW,
                    lambda perturbed_BCHW: self._map(perturbed_BCHW, hidden_B, seed_B),
                )
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
        assert isinstance(map_Bhw, Tensor)  # noqa: S101 - a run's method has one layer
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

    def problem(self, sample: Sample, label: int | None) -> None:
        """Return None: the attacked class is the model's own, so no label is needed."""

    def rows(self, shard: Shard, batch: Batch, explained: Explained | None) -> pa.RecordBatch:
        return Rows(self.schema, partial(_describe, self.schema), _REASONS)(shard, batch, explained)

    def close(self) -> None:
        self._method.close()


def _describe(schema: pa.Schema, batch: Batch, slot_R: NDArray[np.intp], explained: Explained) -> dict[str, pa.Array]:
    """Return the columns of attacked images; pictures as PNG."""
    none_R = explained.status_R == STATUSES.index(NONFINITE)
    columns = {}
    for name, values in explained.columns.items():
        if values.ndim == 1:
            columns[name] = numbers(values, schema.field(name).type, none_R)
        else:
            pictures = [None if none else png(each) for each, none in zip(values, none_R, strict=True)]
            columns[name] = pa.array(pictures, pa.binary())
    plain_R, guided_R = (explained.columns[f"{side}_norm"].astype(np.float64) for side in SIDES)
    still_R = plain_R == 0
    reduction_R = 1 - guided_R / np.where(still_R, 1, plain_R)
    columns["norm_reduction"] = numbers(reduction_R.astype(np.float32), pa.float32(), none_R | still_R)
    return columns
