"""Finer targets against a loop from the definition, against pytorch-grad-cam, and beneath every method."""

import copy

import pytest
import torch
from references import agree
from test_contract import NAMES, TARGETED, build
from torch import nn

from saltern.pipeline.methods import find
from saltern.pipeline.methods.contrast import Contrast, most_similar
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Finer

FINER = Finer(2, 0.6)
COMPARABLE = [name for name in TARGETED if find(name).comparable]
RELEVANCE = ("lrp", "clrp", "relevance-cam")  # they start from several logits, not from the score


class NoHead(nn.Module):
    """A network whose logits come from no single linear layer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) * 2


def cosines(weight_KC):
    """One pair of classes after the other, float64."""
    rows = weight_KC.detach().double()
    return torch.tensor([[float(a @ b / a.norm() / b.norm()) for b in rows] for a in rows])


def similar_by_loop(weight_KC, count):
    return [
        sorted((other for other in range(len(row)) if other != number), key=lambda other: -row[other])[:count]
        for number, row in enumerate(cosines(weight_KC).tolist())
    ]


def test_the_most_similar_classes_are_those_of_the_largest_cosine(tiny, monkeypatch):
    expected = similar_by_loop(tiny.fc.weight, 3)
    assert Contrast(tiny, Finer(3), 16).similar_KN.tolist() == expected
    monkeypatch.setattr("saltern.pipeline.methods.contrast._ROWS", 2)
    assert most_similar(tiny.fc.weight.detach(), 3).tolist() == expected


@pytest.mark.slow
def test_without_one_linear_layer_the_nearest_logits_are_compared(tiny, images):
    x, target = images(4, 16), torch.tensor([0, 1, 2, 4])
    with build("grad-cam", NoHead(tiny), layer="net.stage2", finer=FINER) as method:
        method(x, target)
        rows = zip(method.last.logits_BK.tolist(), target.tolist(), method.last.others_BN.tolist(), strict=True)
        for logits, c, others in rows:
            order = sorted((n for n in range(5) if n != c), key=lambda n: abs(logits[n] - logits[c]))
            assert others == order[:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARABLE)
def test_the_map_explains_the_combination_of_logits(name, tiny, images):
    """A network whose logit c is that combination has the same map for the plain target c."""
    x, target, seed = images(3, 16), torch.tensor([0, 1, 4]), torch.tensor([5, 6, 7])
    with build(name, tiny, finer=FINER) as method:
        found = method(x, target, seed)
        last = method.last
    assert torch.equal(last.target_B, target)
    similar = similar_by_loop(tiny.fc.weight, 2)
    assert last.others_BN.tolist() == [similar[c] for c in target]
    torch.testing.assert_close(last.logits_BK, tiny(x).detach())
    combined = copy.deepcopy(tiny)
    with torch.no_grad():
        for c, others in enumerate(similar):
            for part, whole in ((tiny.fc.weight, combined.fc.weight), (tiny.fc.bias, combined.fc.bias)):
                whole[c] = part[c] - 0.6 * (part[others[0]] + part[others[1]]) / 2
    plain = build(name, tiny)(x, target, seed)
    if name == "shapley-cam":  # the probabilities in its default utility are those of the logits
        found, plain = (build(name, tiny, utility="logit", finer=how)(x, target, seed) for how in (FINER, None))
    if name not in RELEVANCE:
        options = {"utility": "logit"} if name == "shapley-cam" else {}
        agree(found, build(name, combined, **options)(x, target, seed), "combined head", name)
    assert float((found - plain).abs().max() / plain.abs().max()) > 1e-3


@pytest.mark.parametrize("name", COMPARABLE)
def test_a_batch_is_its_single_runs_and_alpha_zero_the_plain_target(name, tiny, images):
    x, target, seed = images(3, 16), torch.tensor([0, 1, 4]), torch.tensor([5, 6, 7])
    for model in (tiny, NoHead(tiny)):
        if model is not tiny and name == "cam":
            continue
        layer = {"layer": "net.stage2"} if model is not tiny and find(name).layered else {}
        with build(name, model, finer=FINER, **layer) as method:
            together = method(x, target, seed)
            single = [method(x[i : i + 1], target[i : i + 1], seed[i : i + 1]) for i in range(3)]
        agree(together, torch.cat(single), "finer: batch of 3 = 3 single runs", name)
    if name not in ("clrp", "relevance-cam"):  # these compare with all classes if no finer target is given
        nothing = build(name, tiny, finer=Finer(2, 0.0))(x, target, seed)
        torch.testing.assert_close(nothing, build(name, tiny)(x, target, seed), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", COMPARABLE)
def test_several_targets_each_have_their_own_similar_classes(name, tiny, images):
    x, seed = images(3, 16), torch.tensor([5, 6, 7])
    with build(name, tiny, finer=FINER) as method:
        for maps, last in method.explain(x, seed_B=seed, number=2):
            expected = method(x, last.target_B, seed)
            if name != "cameras":  # without a target each size has its own top-1
                torch.testing.assert_close(maps, expected)
            assert torch.equal(last.others_BN, method.last.others_BN)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARABLE)
def test_finer_under_autocast(name, tiny, images):
    x, target = images(2, 24), torch.tensor([1, 2])
    with build(name, tiny, finer=FINER) as method:
        exact = method(x, target)
        with torch.autocast("cpu", torch.bfloat16):
            rough = method(x, target)
            method.halve(x, torch.bfloat16)
            assert torch.equal(method(x, target), rough)
    assert 0 < (rough - exact).norm() < 0.6 * exact.norm()


def test_relevance_starts_from_the_classes_that_are_compared(tiny, images):
    """Relevance is linear in its start, so it is the sum of the relevance of single classes."""
    x, target = images(2, 16), torch.tensor([0, 3])
    similar, logits = similar_by_loop(tiny.fc.weight, 2), tiny(x).detach()

    def of(name, **options):
        return torch.stack([build(name, tiny, **options)(x, torch.full((2,), c)) for c in range(5)])

    lrp, contrast = of("lrp"), of("relevance-cam")
    one, unit = torch.ones_like(logits), lrp / logits.T[:, :, None, None]
    # relevance-cam's start for c is +1 at c, -1/5 at the others.
    cases = [("lrp", {}, lrp, one), ("clrp", {}, unit, one), ("clrp", {"init": "paper"}, unit, logits)]
    for name, options, single, scale in [*cases, ("relevance-cam", {}, (contrast + contrast.sum(0)) / 1.2, one)]:
        expected = torch.stack([
            (single[c, row] - 0.3 * single[similar[c], row].sum(0)) * scale[row, c]
            for row, c in enumerate(target.tolist())
        ])  # fmt: skip
        with build(name, tiny, finer=FINER, **options) as method:
            agree(method(x, target), expected, "relevance of single classes", name)


def test_one_class_to_compare_with_equals_the_published_library(network, images):
    import pytorch_grad_cam as theirs  # takes seconds

    # With more classes pytorch-grad-cam weights them by their probabilities; the paper takes the mean.
    model, x = copy.deepcopy(network("resnet18")), images(2, 64)
    with torch.no_grad():
        for value in model.fc.parameters():
            value /= 20  # the library adds 1e-9 to probabilities
        target = model(x).argmax(1)
    with build("grad-cam", NoHead(model), layer="net.layer3", finer=Finer(1, 1.0)) as method:
        found = method(x, target)
    cam = theirs.FinerCAM(NoHead(model), [model.layer3])
    raw = []
    cam.base_cam.compute_cam_per_layer = lambda x, targets, smooth: raw.append(
        [torch.from_numpy(kept[0].numpy()) for kept in (held.activations, held.gradients)]
    )
    cam.base_cam.aggregate_multi_layers = lambda per_layer: None
    held = cam.base_cam.activations_and_grads
    cam(x, alpha=1, comparison_categories=[1])
    A, G = raw[0]
    model.zero_grad(set_to_none=True)
    agree(found, torch.einsum("bk,bkhw->bhw", G.mean((2, 3)), A).relu(), "pytorch-grad-cam FinerCAM", "resnet18")


@pytest.mark.slow
def test_methods_that_explain_one_class_are_refused_in_one_line(tiny):
    refused = [name for name in TARGETED if name not in COMPARABLE]
    assert "sglrp" in refused
    for name in [*refused, "captum:Saliency", "odd_methods:Mean"]:
        with pytest.raises(UserError, match="cannot compare a class with similar ones"):
            build(name, tiny, finer=FINER)
    with pytest.raises(UserError, match="give unit or paper"):
        build("relevance-cam", tiny, finer=FINER, init="sglrp")
    for count in (0, 5):
        with pytest.raises(UserError, match="the model has 4 others"):
            build("grad-cam", tiny, finer=Finer(count))
    for name in NAMES:
        if not find(name).needs_target:
            build(name, tiny, finer=FINER).close()  # as with any other target
