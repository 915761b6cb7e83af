"""The figures of `saltern bench localization`: core time of the localization metrics from stored maps of 7 x 7.

Shape suffixes: B maps, h w a map's grid, H W the network's input.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from saltern.pipeline.bench.figures import Figure
from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.maps.frame import lay, to_original
from saltern.pipeline.metrics.localization.accuracy import THRESHOLDS, BoxAccuracies
from saltern.pipeline.metrics.localization.boxes import iou, is_hit, map_f1, unit
from saltern.pipeline.metrics.localization.maxbox import box_hits, unit_map
from saltern.pipeline.metrics.localization.pointing import energy_inside, highest_point, is_pointed_at
from saltern.schemas.saliency import Box

GOAL_MS, PEER_GOAL, MEMORY_GOAL = 2.4, 50.0, 1.05  # 50,000 samples in 2 core-minutes
IN_GOAL = ("LE", "F1", "MaxBoxAcc and V2")
_SIDE, _SIZE, _GEOMETRY = 224, (375, 500), (1.5, 1.5, 82.0, 19.5)  # the network's input, a photograph, and its crop
_PORTION = 500  # samples, about a shard's


@dataclass(frozen=True)
class LocalizationBench:
    """Options of the measurement."""

    samples: int = 50_000
    peer_samples: int = 20  # of these, for wsolevaluation's way


class Portion(NamedTuple):
    """Maps with their true boxes, and with found ones, in the original."""

    map_Bhw: NDArray[np.float32]  # noqa: N815
    found: list[list[Box]]
    true: list[list[Box]]


def measure(bench: LocalizationBench) -> Iterator[Figure]:
    """Yield the core time of all metrics, the ratio to wsolevaluation's way, and the growth of memory."""
    torch.set_num_threads(1)
    accuracies, peaks = BoxAccuracies(), list[float]()
    metrics: dict[str, Callable[[Portion], object]] = {
        "LE": lambda portion: [is_hit(*boxes) for boxes in zip(portion.found, portion.true, strict=True)],
        "F1": lambda portion: [map_f1(_laid(map_hw), true) for map_hw, true in _each(portion)],
        "MaxBoxAcc and V2": _hits,
        "pointing game": lambda portion: [_points(map_hw, true) for map_hw, true in _each(portion)],
        "energy pointing": lambda portion: [energy_inside(_laid(map_hw), true) for map_hw, true in _each(portion)],
    }
    _hits(_portion(8, 0))  # warm up
    spent = dict.fromkeys((*metrics, "bootstrap"), 0.0)
    for start in range(0, bench.samples, _PORTION):
        portion = _portion(min(_PORTION, bench.samples - start), start)
        made = {name: _timed(spent, name, metric, portion) for name, metric in metrics.items()}
        _timed(spent, "bootstrap", accuracies.add, made["MaxBoxAcc and V2"])
        peaks.append(_peak_mb())
    each = {name: 1000 * seconds / bench.samples for name, seconds in spent.items()}
    total = sum(each[name] for name in IN_GOAL)
    parts = ", ".join(f"{name} {ms:.2g}" for name, ms in each.items())
    name = f"{' + '.join(IN_GOAL)} of a sample"
    miss = f"the load was {os.getloadavg()[0]:.1f}"
    yield Figure(name, total, GOAL_MS, "core-ms", False, f"{bench.samples:,} samples; {parts}", miss)
    yield _against_peer(bench, each["MaxBoxAcc and V2"])
    early = peaks[len(peaks) // 10]
    note = f"{peaks[-1]:.0f} MB after all samples / {early:.0f} MB after a tenth"
    yield Figure("peak memory of the process", peaks[-1] / early, MEMORY_GOAL, "x", False, note)


def _timed(spent: dict[str, float], name: str, function: Callable[[Any], object], given: Any) -> Any:
    since = time.process_time()
    made = function(given)
    spent[name] += time.process_time() - since
    return made


def _portion(samples: int, seed: int) -> Portion:
    """Return smooth maps with some zeros, as CAMs are, and boxes of the size of ImageNet's."""
    rng = np.random.default_rng(seed)
    noise_Bhw = rng.standard_normal((samples, 7, 7)).astype(np.float32)
    map_Bhw = np.stack([cv2.GaussianBlur(noise_hw, (3, 3), 0) for noise_hw in noise_Bhw]).clip(0)
    boxes = [[_box(rng) for _ in range(count)] for count in rng.choice([1, 1, 1, 2], samples).tolist()]
    return Portion(map_Bhw, [[_box(rng)] for _ in range(samples)], boxes)


def _box(rng: np.random.Generator) -> Box:
    height, width = (int(rng.integers(side // 4, side)) for side in _SIZE)
    y, x = int(rng.integers(0, _SIZE[0] - height + 1)), int(rng.integers(0, _SIZE[1] - width + 1))
    return x, y, x + width, y + height


def _each(portion: Portion) -> Iterator[tuple[NDArray[np.float32], list[Box]]]:
    return zip(portion.map_Bhw, portion.true, strict=True)


def _laid(map_hw: NDArray[np.float32]) -> Any:
    return lay(unit(map_hw), (_SIDE, _SIDE), _GEOMETRY, *_SIZE, smooth=True)


def _points(map_hw: NDArray[np.float32], true: list[Box]) -> bool:
    return is_pointed_at(highest_point(map_hw, (_SIDE, _SIDE), list(_GEOMETRY), *_SIZE), true, *_SIZE)


def _hits(portion: Portion) -> NDArray[np.uint8]:
    geometry_B4, size_B2 = _placed(len(portion.map_Bhw))
    return box_hits(portion.map_Bhw, (_SIDE, _SIDE), geometry_B4, size_B2, portion.true)


def _placed(samples: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    return np.tile(_GEOMETRY, (samples, 1)), np.tile(np.array(_SIZE, np.int32), (samples, 1))


def _against_peer(bench: LocalizationBench, ours_ms: float) -> Figure:
    """Return the ratio to a loop over the thresholds, as wsolevaluation's evaluation.py has it, for each metric."""
    portion = _portion(bench.peer_samples, 0)
    since = time.process_time()
    for every in (False, True):
        for map_hw, true in _each(portion):
            map_HW = upsample(torch.from_numpy(map_hw[None]), (_SIDE, _SIDE))[0].numpy()
            _by_thresholds(map_HW, true, every)
    peer_ms = 1000 * (time.process_time() - since) / bench.peer_samples
    note = f"{peer_ms:.0f} / {ours_ms:.2f} core-ms a sample; theirs on {bench.peer_samples} samples"
    return Figure("wsolevaluation's way / MaxBoxAcc and V2", peer_ms / ours_ms, PEER_GOAL, "x", True, note)


def _by_thresholds(map_HW: NDArray[np.float32], true: list[Box], every: bool) -> list[float]:
    """Return the best IoU at each threshold, with the contours of each found separately."""
    eight_HW = (unit_map(map_HW) * 255).astype(np.uint8)
    best = []
    for threshold in THRESHOLDS.tolist():
        mask_HW = cv2.threshold(eight_HW, int(threshold * int(eight_HW.max())), 255, cv2.THRESH_BINARY)[1]
        contours = cv2.findContours(mask_HW, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        contours = contours if every else [max(contours, key=cv2.contourArea)]
        found_R4 = np.array([cv2.boundingRect(contour) for contour in contours])
        found_R4[:, 2:] += found_R4[:, :2] + 1
        box_R4 = to_original(found_R4.clip(0, _SIDE), *_placed(len(found_R4)))
        best.append(max(iou((x0, y0, x1, y1), true) for x0, y0, x1, y1 in box_R4.tolist()))
    return best


def _peak_mb() -> float:
    """Return the most memory that the process has held, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
