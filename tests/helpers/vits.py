"""Small vision transformers of the libraries, with random weights, and what is known of each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import open_clip
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

CLASSES = 7
_TINY = {"depth": 3, "embed_dim": 32, "num_heads": 4, "num_classes": CLASSES}
_HUGGING = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 64, "patch_size": 16, "num_labels": CLASSES,
}  # fmt: skip


class Logits(nn.Module):
    """A classifier of transformers that gives its logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.inner(x_BCHW).logits


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **(_TINY | {"img_size": 64} | options))


def _open_clip(**options: object) -> Callable[[], nn.Module]:
    tower = open_clip.transformer.VisionTransformer
    return lambda: tower(64, 16, 32, 3, 4, 2.0, output_dim=CLASSES, **options)


def _hugging(kind: str) -> Callable[[], nn.Module]:
    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForImageClassification")
    return lambda: Logits(model(config(**_HUGGING)))


@dataclass(frozen=True)
class Family:
    """How a small model is made, and where its attention is."""

    make: Callable[[], nn.Module]
    blocks: str  # name of the list of blocks
    prefix: int = 1  # tokens before the patches
    read: tuple[int, ...] | None = (0,)  # tokens that reach the logits; None = patches
    pool: str = ""  # module that pools by attention
    image: tuple[int, int] = (64, 64)  # height and width, pixels; patches of 16


FAMILIES = {
    "torchvision": Family(
        lambda: VisionTransformer(64, 16, 3, 4, 32, 64, num_classes=CLASSES), "encoder.layers"
    ),
    "timm": Family(_timm("vit_tiny_patch16_224"), "blocks"),
    "timm-avg": Family(_timm("vit_tiny_patch16_224", global_pool="avg"), "blocks", 1, None),
    "timm-wide": Family(_timm("vit_tiny_patch16_224", img_size=(32, 80)), "blocks", image=(32, 80)),
    "deit-distilled": Family(_timm("deit_tiny_distilled_patch16_224"), "blocks", 2, (0, 1)),
    "dinov2": Family(_timm("vit_small_patch14_reg4_dinov2", patch_size=16), "blocks", 5),
    "dinov3": Family(_timm("vit_small_patch16_dinov3"), "blocks", 5, None),
    "siglip": Family(_timm("vit_base_patch16_siglip_224"), "blocks", 0, (0,), "attn_pool"),
    "clip": Family(_open_clip(), "transformer.resblocks"),
    "coca": Family(_open_clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=7),
                   "transformer.resblocks", 1, (0,), "attn_pool.attn"),
    "hf-vit": Family(_hugging("ViT"), "inner.vit.layers"),
    "hf-dinov2": Family(_hugging("Dinov2WithRegisters"), "inner.dinov2_with_registers.encoder.layer", 5),
}  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all parameters random values, those of norms and biases too, so large that attention is uneven."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        with torch.no_grad():
            if value.ndim > 1:
                fan = value[0].numel() if "pos" not in name and "token" not in name else 4
                value.copy_(torch.randn(value.shape, generator=draw) * 1.5 * fan**-0.5)
            else:
                scales = ("weight", "gamma", "lambda1")  # of norms and layer scales
                offset = 1.0 if name.endswith(scales) else 0.0
                value.copy_(offset + 0.3 * torch.randn(value.shape, generator=draw))
    return model.eval()


@cache
def made(name: str) -> nn.Module:
    """Return the model of a family, randomised; made once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(FAMILIES[name].make())


def head(name: str, model: nn.Module, tokens_BTD: Tensor) -> Tensor:
    """Return the logits of tokens that the last block gives."""
    if name == "torchvision":
        return model.heads(model.encoder.ln(tokens_BTD)[:, 0])
    if name in ("clip", "coca"):
        return model._pool(tokens_BTD)[0] @ model.proj
    if name == "hf-vit":
        return model.inner.classifier(model.inner.vit.layernorm(tokens_BTD)[:, 0])
    if name == "hf-dinov2":
        tokens_BTD = model.inner.dinov2_with_registers.layernorm(tokens_BTD)
        return model.inner.classifier(torch.cat([tokens_BTD[:, 0], tokens_BTD[:, 5:].mean(1)], 1))
    return model.forward_head(model.norm(tokens_BTD))


def images(count: int, height: int = 64, width: int = 64) -> Tensor:
    """Return fixed random images."""
    draw = torch.Generator().manual_seed(count + height)
    return torch.randn(count, 3, height, width, generator=draw)


def images_of(name: str, count: int) -> Tensor:
    """Return fixed random images of the size that a family takes."""
    return images(count, *FAMILIES[name].image)


class _Brightest(nn.Module):
    """Attention to the brightest token. Channels: brightness, 1, what was attended to."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        bright_BT1, one_BT1 = x_BTC[..., :1], x_BTC[..., 1:2]
        q, k, v = (part[:, None] for part in (
            torch.cat([9 * one_BT1, 0 * one_BT1], 2), torch.cat([bright_BT1, one_BT1], 2), bright_BT1.expand(-1, -1, 2)
        ))  # fmt: skip
        return F.pad(F.scaled_dot_product_attention(q, k, v)[:, 0, :, :1], (2, 0))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Brightest()

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.attention(x_BTC)


class Brightest(nn.Module):
    """A transformer that looks at the brightest patch of 8 x 8 pixels, by its class token or averaging its patches."""

    def __init__(self, *, averages: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Residual(), _Residual()])
        self.averages = averages

    def forward(self, x_BCHW: Tensor) -> Tensor:
        bright_BT1 = F.avg_pool2d(x_BCHW.mean(1, keepdim=True), 8).flatten(2).mT
        x_BTC = torch.cat([bright_BT1, torch.ones_like(bright_BT1), torch.zeros_like(bright_BT1)], 2)
        x_BTC = F.pad(x_BTC, (0, 0, 1, 0))
        x_BTC[:, 0, 1] = 1
        for block in self.blocks:
            x_BTC = block(x_BTC)
        score_B = (x_BTC[:, 1:].mean(1) if self.averages else x_BTC[:, 0])[:, 2]
        return torch.stack([score_B, -score_B], 1)
