"""Several targets at once: the maps of single runs, from the forward passes of one."""

import pytest
import torch
from odd_methods import Mean
from test_contract import TARGETED, build

from saltern.pipeline.methods import available, find
from saltern.pipeline.methods.gradients.gradient import Gradient

NUMBER = 3


def counted(model, run):
    """Return what `run` returns, and the forward passes of the model in it."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        return run(), len(calls)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", TARGETED)
def test_maps_are_those_of_single_runs_from_as_few_passes_as_one(name, tiny, images):
    x, seed = images(3, 16), torch.tensor([5, 6, 7])
    with build(name, tiny) as method:
        method(x)  # ablation-cam checks itself once
        first, single = counted(tiny, lambda: method(x, None, seed))
        order_BK = method.last.logits_BK.topk(NUMBER, 1).indices
        expected = [first, *(method(x, order_BK[:, rank], seed) for rank in range(1, NUMBER))]
        found, passes = counted(tiny, lambda: method.explain(x, seed_B=seed, number=NUMBER))
        assert method.last is found[0][1]
    assert passes == single * (1 if find(name).shares_forward() else NUMBER)
    for rank, (maps, last) in enumerate(found):
        assert torch.equal(maps, expected[rank]), rank
        assert torch.equal(last.target_B, order_BK[:, rank])


def test_every_method_of_a_class_shares_its_passes():
    assert [name for name, kind in available().items() if kind.needs_target and not kind.shares_forward()] == []


def test_a_method_of_the_user_has_passes_for_each_target(tiny, images):
    class Own(Gradient):
        """Gradient with a `compute` of its own."""

        def compute(self, x_BCHW, target_B):
            logits_BK = self.model(x_BCHW)
            return x_BCHW.mean(1) * (1 if target_B is None else 2), logits_BK, target_B

    for kind in (Mean, Own):
        assert not kind.shares_forward()
        _, passes = counted(tiny, lambda kind=kind: kind(tiny).explain(images(2, 8), number=NUMBER))
        assert passes == NUMBER
    first, second = Own(tiny).explain(images(2, 8), number=2)
    assert torch.equal(first[0] * 2, second[0])


@pytest.mark.parametrize("name", ["grad-cam", "relevance-cam"])
def test_several_layers_and_targets(name, tiny, images):
    x = images(2, 16)
    with build(name, tiny, layer=["stage1", "stage2"]) as method:
        (first, _), (second, last) = method.explain(x, number=2)
        for maps, target in ((first, None), (second, last.target_B)):
            assert all(map(torch.equal, maps, method(x, target)))


def test_the_chunks_of_cameras_keep_the_targets_of_their_images(tiny, images):
    x = images(5, 16)
    with build("cameras", tiny) as whole, build("cameras", tiny, chunk=2) as parts:
        for (expected, _), (found, last) in zip(whole.explain(x, number=3), parts.explain(x, number=3), strict=True):
            torch.testing.assert_close(found, expected)
            assert len(last.target_B) == 5
