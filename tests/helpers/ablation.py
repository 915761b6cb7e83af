"""References of Ablation-CAM, and checks of how a method computes it."""

import torch

from saltern.pipeline.methods import build


def fast(method):
    """Return whether no module before the layer ran again, and several channels were removed in one pass."""
    return method._tail.batched and not method._tail.whole


def forced_whole(model, layer):
    method = build("ablation-cam", model, layer=layer)
    method._tail.whole = True
    return method


def naive_ablation(model, layer, grid, channel_dim, x, target):
    """Return the maps by the formula, with a whole pass for each image and channel."""
    maps = []
    for image, c in zip(x, target, strict=True):
        A, whole = grid(image[None])[0], model(image[None].clone())[0, c]
        weights = []
        for k in range(len(A)):

            def ablate(module, args, output, k=k):
                return output.index_fill(channel_dim, torch.tensor([k]), 0)

            handle = layer.register_forward_hook(ablate)
            weights.append((whole - model(image[None].clone())[0, c]) / whole)
            handle.remove()
        maps.append(torch.einsum("k,khw->hw", torch.stack(weights), A).relu())
    return torch.stack(maps)
