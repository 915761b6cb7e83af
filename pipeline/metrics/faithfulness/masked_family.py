"""The family `masked`: what several classifiers recognise of images that the mask changed (CASM, figure 3).

Shape suffixes: N samples of a batch, M judged ones, H W the network's input, C colours, K classifiers.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saltern.pipeline.device import memory_format
from saltern.pipeline.extract.explain import AUTOCAST
from saltern.pipeline.extract.extraction import load_model
from saltern.pipeline.metrics.estimate import Estimate, Means
from saltern.pipeline.metrics.faithfulness.further import load_further
from saltern.pipeline.metrics.faithfulness.masked import Correct, masked_classification, start_inpainting
from saltern.pipeline.metrics.faithfulness.masked_plot import draw_masked
from saltern.pipeline.metrics.faithfulness.passes import PIXELS, black_level
from saltern.pipeline.metrics.family import Batch, Family, Summary
from saltern.pipeline.models.passes import frozen, logits_of
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.manifest import load_run
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import EvaluateConfig, ExtractConfig
from saltern.schemas.evaluation import FIELDS
from saltern.schemas.metrics import METRICS

COLUMNS = tuple(field.name for field in FIELDS["masked"])


@dataclass(frozen=True)
class _Judge:
    """A classifier with its normalisation, on the device."""

    model: nn.Module
    mean_C11: Tensor
    std_C11: Tensor
    black_C11: Tensor

    def logits(self, x_BCHW: Tensor) -> Tensor:
        return logits_of(self.model(x_BCHW))


@dataclass(frozen=True)
class _Begun:
    """The judged samples of a batch."""

    at_M: list[int]  # positions in the batch
    pixels_MHWC: NDArray[np.uint8]
    mask_MHW: NDArray[np.bool_]
    inpainted_M: list[Future[NDArray[np.uint8]]]


class _Shares:
    """Top-1 of each kind of image by subject.

    `masked_in` is the mean over the classifiers, `masked_in@MODEL` that of one; likewise the other COLUMNS.
    """

    columns = COLUMNS

    def __init__(self, models: Sequence[str]):
        self._models = len(models)
        self._keys = [*COLUMNS, *(f"{column}@{model}" for column in COLUMNS for model in models)]
        self._sums = defaultdict[str, Means](lambda: Means(len(self._keys)))

    def add(self, subject: str, rows: pa.RecordBatch) -> None:
        lists = [rows[column].drop_null().flatten() for column in COLUMNS]
        right_4NK = np.stack([one.to_numpy(zero_copy_only=False) for one in lists]).astype(float)
        right_4NK = right_4NK.reshape(len(COLUMNS), -1, self._models)
        each_N4K = right_4NK.swapaxes(0, 1).reshape(right_4NK.shape[1], -1)
        self._sums[subject].add(np.concatenate([right_4NK.mean(2).T, each_N4K], 1))

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        return {subject: dict(zip(self._keys, own.estimates(), strict=True)) for subject, own in self._sums.items()}


class MaskedFamily(Family):
    """Top-1 of the run's classifier and of further ones on masked-in, masked-out and inpainted images.

    The mask multiplies the pixels, so what it hides is black, as in CASM's published evaluation. The masked-out part is
    inpainted by OpenCV (Telea, radius 3) in the threads that decode, up to two batches ahead of the classifiers, at
    about 23 images a second and core of 224 x 224 pixels.
    """

    name = "masked"
    metrics = METRICS["masked"]
    needs_pixels = runs_network = takes_classifiers = True

    def __init__(self, config: ExtractConfig, how: EvaluateConfig, device: torch.device):
        super().__init__(config, how, device)
        own = config.preprocess
        self._judges = [self._judge(load_model(how, device), own.mean, own.std)]
        self._judges += [self._judge(load_further(how, one, device), one.mean, one.std) for one in how.classifiers]

    def _judge(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> _Judge:
        mean_C11, std_C11 = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (mean, std))
        return _Judge(model.eval(), mean_C11, std_C11, black_level(mean, std, PIXELS, self.device))

    def begin(self, batch: Batch, pool: Executor) -> _Begun | None:
        """Start the inpainting of the images that have a label and a mask."""
        decoded = [at for at, row in enumerate(batch.rows) if row.geometry is not None]
        slots = [
            slot
            for slot, at in enumerate(decoded)
            if batch.rows[at].mask_bytes is not None and batch.rows[at].label is not None
        ]
        if batch.pixels_MHWC is None or not slots:
            return None
        at_M, pixels_MHWC = [decoded[slot] for slot in slots], batch.pixels_MHWC[slots].numpy()
        mask_MHW = np.stack([batch.rows[at].mask() for at in at_M])
        return _Begun(at_M, pixels_MHWC, mask_MHW, start_inpainting(pool, pixels_MHWC, mask_MHW))

    def measure(self, batch: Batch) -> list[Record]:
        records: list[Record] = [{} for _ in batch.rows]
        begun: _Begun | None = batch.begun
        if begun is None:
            return records
        label_M = torch.tensor([batch.rows[at].label for at in begun.at_M], device=self.device)
        mask_MHW = torch.from_numpy(begun.mask_MHW).to(self.device)
        inpainted_MHWC = np.stack([future.result() for future in begun.inpainted_M])
        unit_MCHW, filled_MCHW = self._unit(begun.pixels_MHWC), self._unit(inpainted_MHWC)
        found = [self._correct(judge, unit_MCHW, filled_MCHW, mask_MHW, label_M) for judge in self._judges]
        # One copy from the device for all classifiers.
        right_M4K = torch.stack([torch.stack(correct, 1) for correct in found], 2).cpu().tolist()
        for at, right_4K in zip(begun.at_M, right_M4K, strict=True):
            records[at] = dict(zip(COLUMNS, right_4K, strict=True))
        return records

    def _unit(self, pixels_MHWC: NDArray[np.uint8]) -> Tensor:
        """Return images in [0, 1] on the device, in the layout of the networks."""
        layout = memory_format(self.how.precision, self.device)
        pixels_MCHW = torch.from_numpy(pixels_MHWC).to(self.device).permute(0, 3, 1, 2)
        return pixels_MCHW.to(torch.float32, memory_format=layout).div_(255)

    def _correct(
        self, judge: _Judge, unit_MCHW: Tensor, filled_MCHW: Tensor, mask_MHW: Tensor, label_M: Tensor
    ) -> Correct:
        x_MCHW, other_MCHW = ((part - judge.mean_C11) / judge.std_C11 for part in (unit_MCHW, filled_MCHW))
        precision = self.how.precision
        cast = torch.autocast(self.device.type, AUTOCAST.get(precision), precision in AUTOCAST)
        with torch.no_grad(), frozen(judge.model), cast:
            inputs = judge.logits, x_MCHW, other_MCHW, mask_MHW, label_M, judge.black_C11
            return masked_classification(*inputs, batch=self.how.batch_size)

    @classmethod
    def summary(cls, store: Store) -> Summary:
        run = load_run(store)
        config = run.config_of(EvaluateConfig) if run is not None else None
        return _Shares([] if config is None else [config.model, *(one.model for one in config.classifiers)])

    @classmethod
    def draw(cls, found: Mapping[str, Mapping[str, Estimate]]) -> bytes | None:
        return draw_masked(found)
