"""The controller of lambda, on toy models of the masks' area."""

import math
import random
from dataclasses import replace

import pytest
import torch

from saltern.pipeline.casm.algorithm.control import Lambda
from saltern.pipeline.casm.algorithm.hyperparameters import PRESETS, Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS

CPU = torch.device("cpu")


def lagging(slope, steps, delay=0):
    """Simulate a mask that follows lambda with a delay, as if trained to an equilibrium at each step."""
    z, queue = 0.0, [0.0] * delay

    def respond(off):
        nonlocal z
        queue.append(off)
        z += (-slope * queue.pop(0) - z) / steps
        return z

    return respond


def drifting(speed):
    """Simulate a mask that moves as long as lambda is wrong, at a bounded speed and with momentum, as under Adam."""
    z, v = 1.0, 0.0

    def respond(off):
        nonlocal z, v
        v += (-math.tanh(3 * off) - v) / 10
        z = max(-6.0, min(6.0, z + speed * v))
        return z

    return respond


RESPONSES = {
    "quick": lambda: lagging(2.76, 5),
    "measured": lambda: lagging(2.76, 20),  # EfficientNet-Lite0: 2.5 gives 0.8 and 12 gives 0.05
    "slow": lambda: lagging(2.76, 100),
    "flat": lambda: lagging(1, 20),
    "steep": lambda: lagging(6, 50),
    "late": lambda: lagging(2.76, 20, delay=20),
    "adam-slow": lambda: drifting(0.02),
    "adam": lambda: drifting(0.1),
    "adam-fast": lambda: drifting(0.2),
}


def run(respond, start, target, steps=1500):
    draw = random.Random(0)
    lam = Lambda(start, target, CPU)
    areas, trail = [], []
    for _ in range(steps):
        z = respond(math.log(float(lam.value) / 6))
        area = min(max(1 / (1 + math.exp(-z)) + draw.gauss(0, 0.03), 0), 1)
        lam.observe(torch.tensor(area))
        areas.append(area)
        trail.append(float(lam.value))
    return areas, trail


@pytest.mark.slow
@pytest.mark.parametrize("start", [1.2, 30.0])
@pytest.mark.parametrize("name", RESPONSES)
def test_settles_and_stays(name, start):
    areas, trail = run(RESPONSES[name](), start, 0.5)
    blocks = [sum(areas[i : i + 10]) / 10 for i in range(0, 1500, 10)]
    # These masks move by 0.02 a step at most: from lambda 30 they need 150 steps for the way back to the area.
    within = 400 if name == "adam-slow" else 300
    assert all(abs(block - 0.5) < 0.15 for block in blocks[within // 10 :])
    assert all(abs(block - 0.5) < 0.1 for block in blocks[50:])
    assert abs(sum(areas[1000:]) / 500 - 0.5) < 0.02
    assert max(trail[1000:]) / min(trail[1000:]) < 2


def test_other_targets():
    areas, _ = run(RESPONSES["measured"](), 6.0, 0.3)
    assert abs(sum(areas[1000:]) / 500 - 0.3) < 0.02


def test_comes_back_from_a_collapse():
    lam = Lambda(10.0, 0.5, CPU)
    for _ in range(5000):
        lam.observe(torch.tensor(0.0))
    assert float(lam.value) >= 10 / 1000 / math.e - 1e-9
    for _ in range(400):
        lam.observe(torch.tensor(0.9))
    assert float(lam.value) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("extreme", "area"), [(0.01, 0.5), (0.99, 0.3)])
def test_masks_come_back_from_an_extreme(staged, batches, extreme, area):
    """A toy network whose first masks are nearly all 0 or 1: in band within 60 steps, and no swings afterwards."""
    thinning = replace(THINNINGS["L100"], save_every=10)
    how = Hyperparameters(thinning, **PRESETS["steady"], mask_area=area, pool_size=5)
    training = Training(staged(), how, side=32)
    with torch.no_grad():
        training.decoder.last.bias.fill_(math.log(extreme / (1 - extreme)))
    data = batches(40, 8, 32)
    areas = [training.step(*data[step % 40]).floats()["mask_mean"] for step in range(220)]
    assert areas[0] == pytest.approx(extreme, abs=0.02)
    means = [sum(areas[step : step + 20]) / 20 for step in range(60, 220, 20)]  # single batches of 8 differ by 0.2
    assert max(abs(mean - area) for mean in means) < 0.15


def test_fixed_stays():
    lam = Lambda(2.5, None, CPU)
    lam.observe(torch.tensor(0.9))
    assert float(lam.value) == 2.5
