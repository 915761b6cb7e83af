"""Explain one batch on the device: from pixels to maps, masks and scores as they are stored.

Shape suffixes: B batch, H W the network's input, h w the stored map's grid, K classes, R rows (a sample has one row for
each of its targets), N bytes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saltern.pipeline.device import memory_format, out_of_memory
from saltern.pipeline.extract.task import STATUSES, Pending
from saltern.pipeline.maps.discretize import discretize, upsample
from saltern.pipeline.maps.encode import CLIP_QUANTILE, pack_mask, quantise
from saltern.pipeline.methods import Last, Method, available
from saltern.pipeline.methods.base import Maps
from saltern.pipeline.models.compiling import compile_parts, refused
from saltern.schemas.config import ExtractConfig, Preprocess
from saltern.schemas.rules import Rule, Target
from saltern.schemas.saliency import NONFINITE

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Explainer:
    """A method with the steps around it: normalisation, targets, discretization, encoding.

    Args:
        method: built on its model, which is on `device`.
        device: of the model.
        preprocess: of the pixels that the explainer will be given.
        target: the classes to explain.
        rule: makes the masks.
        map_size: native (the method's grid) | input (upsampled to the network's input).
        map_dtype: uint8 | float16 | float32, as stored.
        save_map: whether maps are stored.
        precision: fp32 | tf32 | bf16 | fp16, of the model's passes.
    """

    def __init__(
        self,
        method: Method,
        device: torch.device,
        preprocess: Preprocess,
        *,
        target: Target,
        rule: Rule,
        map_size: str = "native",
        map_dtype: str = "float32",
        save_map: bool = True,
        precision: str = "fp32",
    ):
        self.method, self.device = method, device
        self._shape, self._target, self._rule = preprocess.shape, target, rule
        self._map_size, self._map_dtype, self._save_map, self._precision = map_size, map_dtype, save_map, precision
        self._full: int | None = None  # samples of every pass, if it is compiled: each other shape would compile again
        self._mean = torch.tensor(preprocess.mean, device=device).view(3, 1, 1)
        if precision in AUTOCAST and type(method) in available().values():  # another method may use weights as it likes
            x_BCHW = torch.zeros(1, 3, *self._shape, device=device)
            method.halve(x_BCHW.contiguous(memory_format=torch.channels_last), AUTOCAST[precision])
        self._std = torch.tensor(preprocess.std, device=device).view(3, 1, 1)

    @classmethod
    def of_run(
        cls, config: ExtractConfig, method: Method, device: torch.device, *, compiled: bool = False
    ) -> "Explainer":
        """Return the explainer of an extraction; its method is built on the run's model, which is on `device`.

        Args:
            compiled: the model's parts are compiled already, for another method that has the same ones.
        """
        parts = method.trunk() if config.compile and not compiled else []
        explainer = cls(
            method,
            device,
            config.preprocess,
            target=config.target,
            rule=config.discretize,
            map_size=config.map_size,
            map_dtype=config.map_dtype,
            save_map=config.save_map,
            precision=config.precision,
        )
        if parts:
            compile_parts(parts, deterministic=config.deterministic)
        if parts or compiled:
            explainer._full = config.batch_size
        return explainer

    @property
    def clip_quantile(self) -> float | None:
        """The quantile at which the scale of uint8 maps ends; None if it ends at the maximum."""
        return CLIP_QUANTILE if self.method.heavy_tailed and self._map_dtype == "uint8" else None

    @property
    def rows_each(self) -> int:
        """Rows of a sample."""
        return self._target.number if self._target.kind == "top" and self.method.needs_target else 1

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor | None = None) -> Pending:
        """Explain one batch.

        Args:
            pixels_BHWC: uint8, on the host (pinned, for a GPU).
            label_B: int64, on the host; used only if the target is the label.
            seed_B: int64, on the host: seeds the noise of each sample; None = zeros.
        """
        return explain_together([self], lambda *inputs: [self.method.explain(*inputs)], pixels_BHWC, label_B, seed_B)[0]

    def _inputs(
        self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the normalised images, the classes to explain and the seeds, on the device."""
        if self._full is not None:
            pixels_BHWC, label_B = _filled(pixels_BHWC, self._full), _filled(label_B, self._full)
            seed_B = None if seed_B is None else _filled(seed_B, self._full)
        x_BCHW = self._normalise(pixels_BHWC.to(self.device, non_blocking=True))
        chosen_B = self._chosen(label_B.to(self.device, non_blocking=True))
        return x_BCHW, chosen_B, None if seed_B is None else seed_B.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, AUTOCAST.get(self._precision), self._precision in AUTOCAST)

    def _send(self, found: Sequence[tuple[Maps, Last]], pending: Pending, samples: int) -> Pending:
        """Make the stored columns of the first samples, and start their copy to the host."""
        logits_BK = found[0][1].logits_BK
        probability_BK = logits_BK.float().softmax(1)
        parts = [self._columns(maps, last, probability_BK) for maps, last in found]
        for part in parts:
            part["predicted"] = logits_BK.argmax(1)
        # Row order: sample by sample, the targets of a sample adjacent.
        columns = {name: torch.stack([part[name] for part in parts], 1).flatten(0, 1) for name in parts[0]}
        return pending.send({name: column[: samples * self.rows_each] for name, column in columns.items()})

    def _failed(self, error: Exception) -> None:
        """Use smaller batches if memory ran out. Raises UserError if the compiler refuses the model."""
        if self._full is not None and out_of_memory(error):
            self._full = max(1, self._full // 2)  # as the processor halves its batches
        elif self._full is not None and (refusal := refused(error)):
            raise refusal from error

    def _normalise(self, pixels_BHWC: Tensor) -> Tensor:
        layout = memory_format(self._precision, self.device)
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        return x_BCHW.div_(255).sub_(self._mean).div_(self._std)  # in place: a third of the time on a CPU

    def _chosen(self, label_B: Tensor) -> Tensor | None:
        """Return the class of each sample that the user chose, None if the model does."""
        kind, number = self._target.kind, self._target.number
        chosen = {"label": label_B, "class": torch.full_like(label_B, number)}.get(kind)
        return chosen if self.method.needs_target else None

    def _columns(self, map_Bhw: Maps, last: Last, probability_BK: Tensor) -> dict[str, Tensor]:
        assert isinstance(map_Bhw, Tensor)  # noqa: S101 - a run's method has one layer
        target_B, zero_B, nonfinite_B = last.target_B, last.zero_B, last.nonfinite_B
        map_BHW = upsample(map_Bhw, self._shape)
        mask_BHW, threshold_B = discretize(map_BHW, self._rule)
        usable_B = ~(zero_B | nonfinite_B)
        stored_Bhw, lo_B, hi_B = quantise(
            map_BHW if self._map_size == "input" else map_Bhw, self._map_dtype, heavy_tailed=self.method.heavy_tailed
        )
        if self._map_dtype == "float16":
            nonfinite_B = nonfinite_B | ~stored_Bhw.flatten(1).isfinite().all(1)
        agnostic_B = torch.full_like(zero_B, -1, dtype=torch.long)
        columns = {
            "status": torch.where(nonfinite_B, STATUSES.index(NONFINITE), zero_B.long()),
            "target": agnostic_B if target_B is None else target_B,
            "score": agnostic_B.float() if target_B is None else probability_BK.gather(1, target_B[:, None])[:, 0],
            "map_lo": lo_B,
            "map_hi": hi_B,
            "mask": pack_mask(mask_BHW) * usable_B[:, None],
            "mask_threshold": threshold_B,
            "mask_area": mask_BHW.float().mean((1, 2)) * usable_B,
        }
        return columns | ({"map": stored_Bhw} if self._save_map else {})


Explain = Callable[[Tensor, Tensor | None, Tensor | None, int], list[list[tuple[Maps, Last]]]]


def explain_together(
    explainers: Sequence[Explainer], explain: Explain, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor | None
) -> list[Pending]:
    """Explain one batch by several explainers that differ only in their methods.

    Args:
        explain: returns the results of `Method.explain` of each method.
        pixels_BHWC, label_B, seed_B: as for a call.

    Returns:
        The results of each. The time of what they share counts for each, so that a method's rate is that of the method.
    """
    first = next((each for each in explainers if each.method.needs_target), explainers[0])
    pendings = [Pending(explainer.device) for explainer in explainers]
    try:
        inputs = first._inputs(pixels_BHWC, label_B, seed_B)
        with first._autocast():
            found = explain(*inputs, first.rows_each)
        return [
            explainer._send(results, pending, len(pixels_BHWC))
            for explainer, results, pending in zip(explainers, found, pendings, strict=True)
        ]
    except (RuntimeError, MemoryError) as error:
        for explainer in explainers:
            explainer._failed(error)
        raise


def _filled(values: Tensor, length: int) -> Tensor:
    """Return the values with the last one repeated up to a length."""
    missing = length - len(values)
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])]) if missing > 0 else values
