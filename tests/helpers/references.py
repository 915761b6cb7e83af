"""Comparison of maps to independent references, and the largest deviation from each."""

from collections import defaultdict

import torch
from torch import Tensor, nn

# Largest deviation by (reference, model), printed at the end of the test run by the topmost conftest.
SEEN: dict[tuple[str, str], float] = defaultdict(float)


def likely(model: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Return each image's first or second class, in turn: the CAMs of less likely ones are often zero everywhere."""
    with torch.no_grad():
        ranked_B2 = model(x_BCHW).topk(2).indices
    return ranked_B2[range(len(x_BCHW)), [index % 2 for index in range(len(x_BCHW))]]


def agree(found: Tensor, expected: Tensor, reference: str, model: str = "", rtol: float = 1e-4) -> None:
    """Check that every map of a batch (first dimension) deviates by at most rtol of the expected largest magnitude.

    Fails for a constant or zero map, which would prove little.
    """
    assert found.shape == expected.shape
    found, expected = found.detach().double().flatten(1), expected.detach().double().flatten(1)
    assert found.isfinite().all()
    scale_B = expected.abs().amax(1)
    assert (scale_B > 0).all(), "the expected map is zero"
    assert (expected.std(1) > 1e-3 * scale_B).all(), "the expected map is constant"
    deviation = float(((found - expected).abs().amax(1) / scale_B).max())
    SEEN[reference, model] = max(SEEN[reference, model], deviation)
    assert deviation <= rtol, f"{reference} on {model}: {deviation:.2e} of the largest value, {rtol:.0e} allowed"
