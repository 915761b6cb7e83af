"""What is found about a transformer's attention, and which networks have none that methods can use."""

import pytest
import timm
import torch
import vits
from making import tiny
from torch import nn
from torchvision.models import SwinTransformer

from saltern.pipeline.methods import build
from saltern.pipeline.models.towers import find_tower
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", vits.FAMILIES)
def test_calls_tokens_and_what_reaches_the_logits(family):
    known, model = vits.FAMILIES[family], vits.made(family)
    tower = find_tower(model, known.image, "rollout")
    names = [name for name, _ in model.get_submodule(known.blocks).named_children()]
    blocks = [f"{known.blocks}.{name}" for name in names]
    assert [call.block for call in tower.calls] == [*blocks, *([known.pool] if known.pool else [])]
    assert all(call.heads == (7 if call.block == "attn_pool.attn" else 4) for call in tower.calls)
    assert tower.prefix == known.prefix
    assert tower.pools == bool(known.pool)
    read = None if known.read is None else slice(known.read[0], known.read[-1] + 1)
    assert tower.read == read
    assert tower.queries(len(tower.calls) - 1) == (slice(known.prefix, None) if read is None else read)
    for index, block in enumerate(blocks):
        for name in (block, tower.calls[index].module):
            assert tower.index(name) == index
    with pytest.raises(UserError, match=f"layer '{known.blocks}' is not one block with attention; choose one of"):
        tower.index(known.blocks)


def test_a_head_of_zeros_hides_nothing():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=32, num_heads=4, num_classes=3)
    nn.init.zeros_(model.head.weight)
    assert find_tower(model.eval(), 64, "rollout").read == slice(0, 1)


def refusal(model, side, name="rollout"):
    with pytest.raises(UserError) as caught:
        build(name, model.eval(), input_side=side)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_networks_whose_attention_leads_nowhere_are_refused_with_methods_that_fit():
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 3}
    for model, side, name, reason in (
        (tiny(), 32, "attention", "Tiny has no attention"),
        (SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7]), 64, "rollout", "SwinTransformer attends within windows"),
        (
            timm.create_model("cait_xxs24_224", img_size=64, **small),
            64,
            "chefer",
            "Cait attends to other tokens",
        ),
        (Shuffled(), 64, "legrad", "has 4 x 4 tokens that do not follow a patch moved in the image"),
    ):
        line = refusal(model, side, name)
        assert line.startswith(f"method {name} needs attention between all patches of the image, and ")
        assert reason in line
        assert "take grad-cam, layer-cam" in line


class Shuffled(nn.Module):
    """A transformer whose patches are in another order than in the image."""

    def __init__(self):
        super().__init__()
        self.inner = vits.made("timm-avg")
        self.order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        tokens = self.inner.patch_embed(x)[:, self.order]
        for block in self.inner.blocks:
            tokens = block(tokens)
        return self.inner.head(tokens.mean(1))


def test_a_block_that_is_no_member_of_a_list_gives_no_tokens_to_legrad():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.attn = nn.Conv2d(3, 32, 16, 16), nn.MultiheadAttention(32, 4, batch_first=True)
            self.head = nn.Linear(32, 3)

        def forward(self, x):
            tokens = self.patches(x).flatten(2).mT
            return self.head((tokens + self.attn(tokens, tokens, tokens)[0]).mean(1))

    torch.manual_seed(0)
    assert "legrad needs blocks that give tokens" in refusal(Alone(), 64, "legrad")
    with build("chefer", Alone().eval(), input_side=64) as method:
        assert method.layer == ["attn"]
        assert method(vits.images(2)).shape == (2, 4, 4)


def test_logits_that_ignore_attention_and_compiled_models():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vits.made("timm")

        def forward(self, x):
            self.inner(x)
            return x.mean((2, 3))

    assert "the logits of Beside do not depend on the attention of inner.blocks.2.attn" in refusal(Beside(), 64)
    compiled = nn.Sequential(torch.compile(vits.made("timm")))
    assert "0 is compiled; give the model as it was before" in refusal(compiled, 64)


def test_two_layers_and_unknown_ones():
    for layer, line in (
        (["blocks.0", "blocks.1"], "takes one layer"), ("block.1", "has no layer 'block.1'; "),
        ("head", "layer 'head' is not one block with attention; choose one of blocks.0, blocks.1, blocks.2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=line):
            build("attention", vits.made("timm"), layer=layer, input_side=64)
