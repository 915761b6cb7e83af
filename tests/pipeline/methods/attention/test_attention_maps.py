"""The methods on attention equal their definitions, on the transformers of four libraries."""

from functools import cache

import naive_attention
import pytest
import torch
import vits
from references import agree

from saltern.pipeline.methods import build
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Finer

pytestmark = pytest.mark.slow
METHODS = list(naive_attention.REFERENCES)
ONE_HOT = torch.eye(vits.CLASSES, dtype=torch.float64)


def strongest(method, x):
    """Return the class with the largest map for each image: that of grad-eclip is zero for many classes."""
    each = method.explain(x, number=vits.CLASSES if method.needs_target else 2)
    sums = torch.stack([maps.sum((1, 2)) for maps, _ in each], 1).argmax(1)
    ranked = torch.stack([last.target_B if method.needs_target else last.logits_BK.argmax(1) for _, last in each], 1)
    return ranked.gather(1, sums[:, None])[:, 0]


@cache
def seen_of(family):
    """Return what two images show, one after the other; the references change nothing in it."""
    return [naive_attention.run(family, image) for image in vits.images_of(family, 2)]


@pytest.mark.parametrize("family", vits.FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_maps_are_those_of_the_definition(name, family):
    x = vits.images_of(family, 2)
    with build(name, vits.made(family), input_side=vits.FAMILIES[family].image) as method:
        targets = strongest(method, x)
        found, logits = method(x, targets), method.last.logits_BK
    assert found.shape == (2, x.shape[2] // 16, x.shape[3] // 16)
    seen = seen_of(family)
    torch.testing.assert_close(logits.double(), torch.stack([one.logits_K for one in seen]), rtol=1e-5, atol=1e-5)
    reference = naive_attention.REFERENCES[name]
    expected = torch.stack([reference(family, *given) for given in zip(seen, ONE_HOT[targets], strict=True)])
    agree(found, expected, f"float64 loop of {name}", family)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["timm", "siglip"])
def test_a_layer_is_one_block_or_the_first_that_counts(name, family):
    x = vits.images(1)
    with build(name, vits.made(family), layer="blocks.1.attn", input_side=64) as method:
        assert method.layer == ["blocks.1"]
        target = strongest(method, x)
        found = method(x, target)
    with build(name, vits.made(family), layer="blocks.1", input_side=64) as method:
        assert torch.equal(method(x, target), found)
    seen = naive_attention.run(family, x[0])
    options = {"first": 1} if name in ("rollout", "chefer", "legrad") else {"block": 1}
    agree(
        found,
        naive_attention.REFERENCES[name](family, seen, ONE_HOT[int(target)], **options)[None],
        f"{name} of a block",
        family,
    )


@pytest.mark.parametrize("name", ["chefer", "legrad", "grad-eclip"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_finer_target_is_explained_in_place_of_the_logit(name, family):
    x, alpha = vits.images(1), 0.6
    with build(name, vits.made(family), input_side=64, finer=Finer(2, alpha)) as method:
        target = strongest(method, x)
        found, others = method(x, target), method.last.others_BN[0]
    score_K = ONE_HOT[int(target)] - alpha * ONE_HOT[others].mean(0)
    expected = naive_attention.REFERENCES[name](family, naive_attention.run(family, x[0]), score_K)
    agree(found, expected[None], f"{name} of a finer target", family)


@pytest.mark.parametrize("family", ["timm", "clip", "siglip"])
def test_attention_of_one_head(family):
    x, seen = vits.images(1), naive_attention.run(family, vits.images(1)[0])
    maps = []
    for head in (0, 3):
        with build("attention", vits.made(family), input_side=64, head=head) as method:
            maps.append(method(x))
        agree(maps[-1], naive_attention.attention(family, seen, ONE_HOT[0], head=head)[None], "one head", family)
    assert not torch.allclose(*maps)
    with pytest.raises(UserError, match=r"head=4 of attention must be 0 to 3: .* has 4 heads"):
        build("attention", vits.made(family), input_side=64, head=4)
