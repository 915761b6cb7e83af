"""Small models of open_clip with random weights, in folders as open_clip stores them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch

_TEXT = {"context_length": 16, "width": 16, "heads": 2, "layers": 1}
VIT = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": _TEXT,
}
SIGLIP = {**VIT, "init_logit_bias": -10.0, "custom_text": True}
RESNET = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": _TEXT,
}
TIMM = {  # SigLIP's image tower is one of timm
    "embed_dim": 12,
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "image_size": 224},
    "text_cfg": _TEXT,
    "custom_text": True,
}
COLOURS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def stored(folder: Path, config: dict[str, Any], seed: int = 0) -> str:
    """Write a model with random weights, norms and biases included, and return its name for --model."""
    folder.mkdir()
    described = {"model_cfg": config, "preprocess_cfg": COLOURS}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        for name, value in model.named_parameters():
            value.data.add_(0.2 * torch.randn_like(value) * (0 if name.startswith("logit") else 1))
        for name, value in model.named_buffers():
            if "running" in name:
                value.add_(0.2 * torch.rand_like(value))
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


def own() -> torch.nn.Module:
    """Return a user's model of images and texts, with `--model clips:own`."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**VIT)
    model.tokenizer = open_clip.SimpleTokenizer(context_length=_TEXT["context_length"])
    return model


def without_tokenizer() -> torch.nn.Module:
    return open_clip.CLIP(**VIT)


def by_hand(folder: Path, texts: list[list[str]], x_BCHW: torch.Tensor, **more: Any) -> torch.Tensor:
    """Return logits_BK as a loop over images, classes and texts gives them, by open_clip's own calls."""
    model = open_clip.create_model(f"local-dir:{folder}", **more).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    logits_BK = torch.zeros(len(x_BCHW), len(texts))
    for number, own in enumerate(texts):
        mean_D = sum(model.encode_text(tokenizer([text]), normalize=True)[0] for text in own) / len(own)
        mean_D = mean_D / mean_D.norm()
        for at, x_CHW in enumerate(x_BCHW):
            feature_D = model.encode_image(x_CHW[None], normalize=True)[0]
            bias = 0.0 if model.logit_bias is None else model.logit_bias
            logits_BK[at, number] = model.logit_scale.exp() * (feature_D @ mean_D) + bias
    return logits_BK
