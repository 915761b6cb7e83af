"""Layers are drawn again from the logits down, in the order of the pass, by the seed alone."""

import copy

import pytest
import torch
from making import Tiny, tiny
from torch import Tensor, nn

from saltern.pipeline.metrics.sanity.randomise import Randomised, layers_from_the_logits


class Odd(nn.Module):
    """Declared in another order than called; an unused head; parameters of its own; attention; a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.full((8,), 2.0))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Conv2d(8, 8, 1)
        self.stem = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.mix(self.mix(self.stem(x_BCHW)))
        tokens = y_BCHW.flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        logits: Tensor = self.head((mixed * self.scale).mean(1))
        return logits


def test_layers_come_in_the_opposite_order_of_the_pass() -> None:
    assert layers_from_the_logits(tiny(), 32) == ["head", "body.3", "body.1", "body.0"]
    found = layers_from_the_logits(Odd().eval(), 16)
    assert found[0] == ""  # the scale is its own, and the module ends last
    assert found[1] == "head"
    assert set(found[2:4]) == {"attention", "attention.out_proj"}
    assert found[4:] == ["mix", "stem"]


def test_looking_for_layers_changes_no_flag() -> None:
    model = Odd().train()
    model.stem.requires_grad_(False)
    layers_from_the_logits(model, 16)
    assert all(module.training for module in model.modules())
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == ["stem.weight", "stem.bias"]


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    pairs = zip(before.state_dict().items(), after.state_dict().values(), strict=True)
    return {name.rpartition(".")[0] for (name, old), new in pairs if not torch.equal(old, new)}


def test_each_stage_draws_one_more_layer_and_leaves_the_model() -> None:
    model = tiny()
    for one in model.modules():
        if isinstance(one, nn.BatchNorm2d):  # as after training
            nn.init.uniform_(one.weight)
            one.running_mean += 1
    before = copy.deepcopy(model)
    seen = [
        (name, changed(before, copy.deepcopy(now))) for name, now in Randomised(model, ["head", "body.3", "body.1"])
    ]
    assert seen == [("head", {"head"}), ("body.3", {"head", "body.3"}), ("body.1", {"head", "body.3", "body.1"})]
    assert changed(before, model) == set()


def test_each_iteration_starts_again_from_the_trained_model() -> None:
    model = tiny()
    again = Randomised(model, ["head", "body.1"])
    first = [copy.deepcopy(now) for _, now in again]
    assert changed(model, first[0]) == {"head"}
    for once, (_, now) in zip(first, again, strict=True):
        assert changed(once, now) == set()


def test_batch_normalisation_becomes_an_untrained_one() -> None:
    model = tiny()
    norm = model.get_submodule("body.1")
    nn.init.uniform_(norm.weight)
    norm.running_mean += 1
    *_, (_, now) = Randomised(model, ["body.1"])
    fresh, found = nn.BatchNorm2d(8).state_dict(), now.get_submodule("body.1").state_dict()
    assert all(torch.equal(found[name], fresh[name]) for name in fresh)


def test_the_seed_alone_gives_the_weights() -> None:
    model, names = tiny(), layers_from_the_logits(tiny(), 32)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    *_, (_, one) = Randomised(model, names, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # of the caller
    *_, (_, same) = Randomised(model, names, seed=3, stages=1)
    *_, (_, other) = Randomised(model, names, seed=4)
    assert changed(one, same) == set()
    assert "head" in changed(one, other)
    # As the layer itself would draw them.
    torch.manual_seed(3 * 100_003)
    assert torch.equal(nn.Linear(16, 5).weight, one.get_submodule("head").weight)


@pytest.mark.parametrize(("stages", "last"), [(1, ["body.0"]), (2, ["body.3", "body.0"]), (9, None), (None, None)])
def test_stages_are_equal_groups_and_end_with_all_layers(stages: int | None, last: list[str] | None) -> None:
    names = layers_from_the_logits(tiny(), 32)
    assert [name for name, _ in Randomised(tiny(), names, stages=stages)] == (last or names)


def test_parameters_without_a_reset_are_small_and_normal() -> None:
    model = Odd().eval()
    *_, (_, now) = Randomised(model, [""])
    assert isinstance(now, Odd)
    assert 0 < now.scale.std() < 0.1
    assert changed(model, now) == {""}
    assert isinstance(tiny(), Tiny)
