"""Classifiers whose classes are texts: the head of an image tower holds the embeddings of prompts.

Shape suffixes: B batch, C H W the network's input, D features, K classes, T texts of all classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.models.passes import full_precision
from saltern.schemas.errors import UserError
from saltern.schemas.prompts import Prompts

_CHUNK = 256  # texts that are embedded at once
_MANY = 1000  # texts that are worth the start of a GPU
_NEEDED = ("visual", "encode_text", "tokenizer", "logit_scale")


class TextClassifier(nn.Module):
    """Image tower, and a linear head: logits = scale * cosine(features, embedding of the class) + bias.

    CLIP: Radford 2021 (arXiv 2103.00020), section 2.3; the bias is SigLIP's (Zhai 2023, arXiv 2303.15343).

    Args:
        visual: x_BCHW -> features_BD, or a tuple that begins with them.
        embedding_KD: of the classes, each of length 1.
        scale: of the cosine.
        bias: of every logit.
    """

    def __init__(self, visual: nn.Module, embedding_KD: Tensor, scale: float, bias: float = 0.0) -> None:
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(embedding_KD.shape[1], embedding_KD.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(scale * embedding_KD)
            self.head.bias.fill_(bias)
        if isinstance(getattr(visual, "image_size", None), int | tuple):
            self.image_size = visual.image_size

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits_BK, float32: cosines of 16 bits would be too coarse for the scale, which is about 100."""
        features = self.visual(x_BCHW)
        features_BD = features[0] if isinstance(features, tuple) else features
        with full_precision(x_BCHW.device):
            logits_BK: Tensor = self.head(F.normalize(features_BD.float(), dim=-1))
        return logits_BK


def compares_texts(model: nn.Module) -> bool:
    """Return whether a model has an image tower and a text tower."""
    return hasattr(model, "visual") and hasattr(model, "encode_text")


def with_prompts(model: Any, prompts: Prompts, name: str) -> tuple[TextClassifier, Prompts]:
    """Return the image tower with prompts as its classes, and the prompts with their embeddings.

    Args:
        model: in eval mode, on the CPU, float32. Has `visual`, the image tower; `encode_text` and `tokenizer`, which
            embed texts; `logit_scale`, a logarithm; and maybe `logit_bias`.
        prompts: whose embeddings are used, or made if there are none.
        name: of the model, for messages.

    Raises:
        UserError: the model lacks a part, a text is too long, or the embeddings are not finite.
    """
    missing = [part for part in _NEEDED if not hasattr(model, part)]
    if missing:
        raise UserError(f"{name} compares images with texts, and lacks {', '.join(missing)}; set it in the factory")
    if not prompts.embeddings:
        _check_lengths(model.tokenizer, prompts, name)
        embedding_KD = embed(model, prompts.texts())
        if not embedding_KD.isfinite().all():
            raise UserError(f"{name} gives embeddings of texts that are not finite; check its weights")
        prompts = prompts.embedded(embedding_KD.numpy().astype("<f4").tobytes())
    stored = np.frombuffer(prompts.raw(), "<f4").astype(np.float32).reshape(len(prompts.names), -1)
    scale, bias = model.logit_scale.exp().item(), getattr(model, "logit_bias", None)
    return TextClassifier(model.visual, torch.from_numpy(stored), scale, 0.0 if bias is None else bias.item()), prompts


def _check_lengths(tokenizer: Any, prompts: Prompts, name: str) -> None:
    """Raise UserError if a text is cut, as far as the tokenizer tells."""
    encode, length = getattr(tokenizer, "encode", None), getattr(tokenizer, "context_length", None)
    if encode is None or length is None:
        return
    for text in (text for own in prompts.texts() for text in own):
        tokens = len(encode(text)) + 2  # with the marks of its start and its end
        if tokens > length:
            raise UserError(f"the prompt {text[:40]!r}... has {tokens} tokens, and {name} reads {length}; shorten it")


@torch.no_grad()
def embed(model: Any, texts: Sequence[Sequence[str]]) -> Tensor:
    """Return embedding_KD, float32, on the CPU: of each class the normalised mean of its texts' normalised embeddings.

    Args:
        model: as for `with_prompts`.
        texts: of each class, one or more.
    """
    flat = [text for own in texts for text in own]
    owner_T = torch.tensor([number for number, own in enumerate(texts) for _ in own])
    device = "cuda" if len(flat) >= _MANY and torch.cuda.is_available() else "cpu"
    model.to(device)
    parts = [
        F.normalize(model.encode_text(model.tokenizer(flat[at : at + _CHUNK]).to(device)).float(), dim=-1).cpu()
        for at in range(0, len(flat), _CHUNK)
    ]
    model.cpu()
    each_TD = torch.cat(parts)
    sum_KD = torch.zeros(len(texts), each_TD.shape[1]).index_add_(0, owner_T, each_TD)
    return F.normalize(sum_KD, dim=-1)
