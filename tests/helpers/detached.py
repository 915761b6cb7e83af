"""Small transformers written by hand, in which input times gradient is relevance by the epsilon rule.

The standard deviation of LayerNorm and the slope of GELU are constants. With softmax "constant", so are the weights of
attention; with "attnlrp", the gradient passes softmax and each factor of a product takes half (Achtibat 2024).
"""

import torch
from torch import nn
from torch.nn import functional as F


def norm(layer, x):
    mean = x.mean(-1, keepdim=True)
    std = (((x - mean) ** 2).mean(-1, keepdim=True) + layer.eps).sqrt()
    return (x - mean) / std.detach() * layer.weight + layer.bias


def mlp(block, x):
    h = F.linear(x, block[0].weight, block[0].bias)
    return F.linear(h * (F.gelu(h) / h).detach(), block[3].weight, block[3].bias)


def halved(a, b):
    return (a @ b.detach() + a.detach() @ b) / 2


def attend(q, k, v, scores_added, softmax):
    """Return attention of heads (..., tokens, channels)."""
    if softmax == "constant":
        return ((q @ k.mT * q.shape[-1] ** -0.5) + scores_added).softmax(-1).detach() @ v
    return halved((halved(q, k.mT) * q.shape[-1] ** -0.5 + scores_added).softmax(-1), v)


def in_heads(x, count):
    """Return (..., heads, tokens, channels of a head) of (..., tokens, channels)."""
    return x.unflatten(-1, (count, -1)).movedim(-2, -3)


def vit(model, x, softmax):
    """Return the logits of torchvision's VisionTransformer."""
    patches = model.conv_proj(x).flatten(2).mT
    x = torch.cat([model.class_token.repeat(len(x), 1, 1), patches], 1) + model.encoder.pos_embedding
    for block in model.encoder.layers:
        layer = block.self_attention
        weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        h = norm(block.ln_1, x)
        q, k, v = (in_heads(h @ W.T + b, layer.num_heads) for W, b in zip(weights, biases, strict=True))
        out = attend(q, k, v, 0, softmax).movedim(-3, -2).flatten(-2)
        x = x + out @ layer.out_proj.weight.T + layer.out_proj.bias
        x = x + mlp(block.mlp, norm(block.ln_2, x))
    return model.heads(norm(model.encoder.ln, x)[:, 0])


def window_attention(layer, x_BHWK, softmax):
    """Return shifted window attention, one window after the other."""
    (side, _), (shift, _), heads = layer.window_size, layer.shift_size, layer.num_heads
    B, H, W, K = x_BHWK.shape
    shift = 0 if side >= H else shift
    place = torch.arange(side)
    delta = (place[:, None] - place)[:, None, :, None] + side - 1, (place[:, None] - place)[None, :, None] + side - 1
    table = layer.relative_position_bias_table.view(2 * side - 1, 2 * side - 1, heads)
    bias = table[delta[0], delta[1]].reshape(side**2, side**2, heads).movedim(-1, 0)
    rows = {}
    for top in range(0, H, side):
        for left in range(0, W, side):
            i, j = torch.meshgrid(top + place, left + place, indexing="ij")
            region = sum(3 ** (axis is i) * ((axis >= H - side).int() + (axis >= H - shift).int()) for axis in (i, j))
            region = region.flatten() if shift else torch.zeros(side**2)
            i, j = (i.flatten() + shift) % H, (j.flatten() + shift) % W
            q, k, v = (in_heads(part, heads) for part in layer.qkv(x_BHWK[:, i, j]).chunk(3, -1))
            out = attend(q, k, v, bias - 100.0 * (region[:, None] != region), softmax)
            out = layer.proj(out.movedim(-3, -2).flatten(-2))
            rows |= {(int(y), int(x)): out[:, index] for index, (y, x) in enumerate(zip(i, j, strict=True))}
    return torch.stack([rows[y, x] for y in range(H) for x in range(W)], 1).view(B, H, W, K)


def swin(model, x, softmax):
    """Return the logits of torchvision's SwinTransformer, for sides that need no padding."""
    stem, *stages = model.features
    x = norm(stem[2], stem[0](x).movedim(1, -1))
    for stage in stages:
        if not isinstance(stage, nn.Sequential):  # merges patches
            parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            x = stage.reduction(norm(stage.norm, torch.cat(parts, -1)))
            continue
        for block in stage:
            x = x + window_attention(block.attn, norm(block.norm1, x), softmax)
            x = x + mlp(block.mlp, norm(block.norm2, x))
    return model.head(norm(model.norm, x).mean((1, 2)))
