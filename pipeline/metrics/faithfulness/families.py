"""The families that pass changed images through the run's network.

Shape suffixes: B batch, H W the network's input, C channels.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saltern.pipeline.device import memory_format
from saltern.pipeline.extract.explain import AUTOCAST
from saltern.pipeline.extract.extraction import load_method
from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.metrics.controls import sample_seeds
from saltern.pipeline.metrics.faithfulness.composite import adcc, arcc, coherency, complexity
from saltern.pipeline.metrics.faithfulness.confidence import average_drop, densities, marked_probability
from saltern.pipeline.metrics.faithfulness.curves import deletion, insertion
from saltern.pipeline.metrics.faithfulness.maps import MapFamily
from saltern.pipeline.metrics.faithfulness.passes import NORMALISED, PIXELS, black_level, target_probability
from saltern.pipeline.metrics.faithfulness.road import road
from saltern.pipeline.models.passes import frozen, logits_of
from saltern.pipeline.runs.reader import Row
from saltern.schemas.config import EvaluateConfig, ExtractConfig
from saltern.schemas.evaluation import FOUND
from saltern.schemas.metrics import METRICS


@dataclass(frozen=True)
class Images:
    """A batch of images with the maps of one subject, on the device."""

    subject: str
    x_BCHW: Tensor  # float32, normalised
    map_BHW: Tensor  # float32
    target_B: Tensor  # int64: the class of each map; of a class-agnostic one, the network's top-1
    seed_B: Tensor  # int64


class NetworkFamily(MapFamily):
    """Base of these families."""

    needs_pixels = runs_network = True

    def __init__(self, config: ExtractConfig, how: EvaluateConfig, device: torch.device):
        super().__init__(config, how, device)
        self._precision, self.batch = how.precision, how.batch_size
        self._model, self._method = load_method(config, device)
        self._model.eval()
        mean, std = config.preprocess.mean, config.preprocess.std
        self._mean, self._std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (mean, std))
        self.black_C11 = black_level(mean, std, PIXELS if how.pixels else NORMALISED, device)

    def measure_maps(
        self, subject: str, rows: list[Row], map_MHW: Tensor, pixels_MHWC: Tensor | None
    ) -> dict[str, Tensor]:
        assert pixels_MHWC is not None  # noqa: S101 - the family needs pixels
        layout = memory_format(self._precision, self.device)
        x_BCHW = pixels_MHWC.to(self.device).permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        x_BCHW = x_BCHW.div_(255).sub_(self._mean).div_(self._std)
        seed_B = sample_seeds(self.config.seed, [row.key for row in rows])
        cast = torch.autocast(self.device.type, AUTOCAST.get(self._precision), self._precision in AUTOCAST)
        with torch.no_grad(), frozen(self._model), cast:
            target_B = self._targets(rows, x_BCHW)
            return self.measure_images(Images(subject, x_BCHW, map_MHW, target_B, seed_B.to(self.device)))

    def _targets(self, rows: Sequence[Row], x_BCHW: Tensor) -> Tensor:
        """Return the classes. Of a class-agnostic map, `predicted` may be of another network, as CASM's classifier."""
        target_B = torch.tensor([-1 if row.target is None else row.target for row in rows], device=self.device)
        if all(row.target is not None for row in rows):
            return target_B
        starts = range(0, len(x_BCHW), self.batch)
        top1_B = torch.cat([self.logits(x_BCHW[at : at + self.batch]).argmax(1) for at in starts])
        return torch.where(target_B < 0, top1_B, target_B)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        return logits_of(self._model(x_BCHW))

    def explain(self, x_BCHW: Tensor, target_B: Tensor, seed_B: Tensor) -> Tensor:
        """Return the method's maps of other images, at the network's input, with the noise of the run's maps."""
        map_Bhw = self._method(x_BCHW, target_B if self._method.needs_target else None, seed_B)
        assert isinstance(map_Bhw, Tensor)  # noqa: S101 - a run's method has one layer
        return upsample(map_Bhw, (x_BCHW.shape[2], x_BCHW.shape[3]))

    @abstractmethod
    def measure_images(self, images: Images) -> dict[str, Tensor]:
        """Return one value an image, by column."""


class PerturbationFamily(NetworkFamily):
    """Areas under the probability of the class while pixels are inserted or deleted in the order of the map."""

    name = "perturbation"
    metrics = METRICS["perturbation"]

    def measure_images(self, images: Images) -> dict[str, Tensor]:
        inputs = self.logits, images.x_BCHW, images.map_BHW, images.target_B
        whole_B = target_probability(self.logits, images.x_BCHW, images.target_B, batch=self.batch)
        return {
            "insertion": insertion(*inputs, batch=self.batch, whole_B=whole_B).area_B,
            "deletion": deletion(*inputs, batch=self.batch, whole_B=whole_B).area_B,
        }


class ConfidenceFamily(NetworkFamily):
    """The probability of the class on the image that is multiplied by its map."""

    name = "confidence"
    metrics = METRICS["confidence"]
    multiplies = True

    def measure_images(self, images: Images) -> dict[str, Tensor]:
        inputs = self.logits, images.x_BCHW, images.map_BHW, images.target_B, self.black_C11
        marked_B = marked_probability(*inputs, batch=self.batch)
        change = average_drop(*inputs, batch=self.batch, marked_B=marked_B)
        density = densities(*inputs, batch=self.batch, marked_B=marked_B)
        return {
            "average_drop": change.drop_B,
            "increase": change.increase_B,
            "rho_plus": density.positive_B,
            "rho_minus": density.negative_B,
        }


class RoadFamily(NetworkFamily):
    """Remove and debias: the probability of the class without the most and without the least relevant pixels."""

    name = "road"
    metrics = METRICS["road"]

    def measure_images(self, images: Images) -> dict[str, Tensor]:
        inputs = self.logits, images.x_BCHW, images.map_BHW, images.target_B, images.seed_B
        return {"road": road(*inputs, batch=self.batch).combined_B}


class CompositeFamily(NetworkFamily):
    """Harmonic means of coherency, simplicity and faithfulness. Controls have none, as coherency needs a method."""

    name = "composite"
    metrics = METRICS["composite"]
    multiplies = True

    def measure_images(self, images: Images) -> dict[str, Tensor]:
        x_BCHW, map_BHW, target_B = images.x_BCHW, images.map_BHW, images.target_B
        if images.subject != FOUND:
            return {}
        explain = partial(self.explain, seed_B=images.seed_B)
        coherency_B = coherency(explain, x_BCHW, map_BHW, target_B, self.black_C11)
        complexity_B = complexity(map_BHW)
        inputs = self.logits, x_BCHW, map_BHW, target_B
        whole_B = target_probability(self.logits, x_BCHW, target_B, batch=self.batch)
        drop_B = average_drop(*inputs, self.black_C11, batch=self.batch, whole_B=whole_B).drop_B
        road_B = road(*inputs, images.seed_B, batch=self.batch, whole_B=whole_B).combined_B
        return {
            "coherency": coherency_B,
            "adcc": adcc(coherency_B, complexity_B, drop_B),
            "arcc": arcc(coherency_B, complexity_B, road_B),
        }
