"""Functions of torch by what relevance does at them."""

from typing import Any

import torch
from torch.nn import functional as F


def _functions(names: str) -> frozenset[Any]:
    spaces = (torch, torch.Tensor, F)
    return frozenset(getattr(space, name) for name in names.split() for space in spaces if hasattr(space, name))


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


RECTIFIERS = _functions("relu relu_ relu6")
CLAMPS = _functions("hardtanh hardtanh_ clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_")
ACTIVATIONS = _functions(
    "leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ silu gelu hardswish mish softplus prelu tanh tanh_ threshold"
    " threshold_ rrelu rrelu_"
)
DROPOUTS = _functions("dropout dropout_ dropout2d feature_dropout alpha_dropout")
MAX_POOLS = _functions("max_pool2d adaptive_max_pool2d")
MEAN_POOLS = _functions("avg_pool2d")
ADAPTIVE_POOLS = _functions("adaptive_avg_pool2d mean")
SUMS = _functions("add add_ __add__ __radd__ __iadd__")
SCALINGS = _functions(
    "sub sub_ subtract __sub__ __rsub__ __isub__ rsub mul mul_ multiply __mul__ __rmul__ __imul__ div div_ divide"
    " true_divide __truediv__ __itruediv__ neg"
)
CONCATENATIONS = _functions("cat concat concatenate")
# They only move values about, so that their own backward routes relevance.
ROUTES = _functions(
    "view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to permute"
    " transpose swapaxes swapdims moveaxis movedim t contiguous clone chunk split split_with_sizes tensor_split unbind"
    " narrow select index_select stack roll flip pixel_shuffle pixel_unshuffle channel_shuffle __getitem__ pad to float"
    " double half bfloat16 type type_as cpu cuda detach"
) | {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
# Names of autograd's nodes that may stand in a graph of relevance.
NODES = _words(
    "Accumulate Alias AsStrided Cat Clone ConstantPadNd CopySlices Expand Flip Index IndexSelect"
    " MaxPool2DWithIndices Narrow NativeChannelShuffle Permute PixelShuffle PixelUnshuffle ReflectionPad2D"
    " ReplicationPad2D Reshape ReshapeAlias Roll Select Slice Split SplitWithSizes Squeeze Stack Step T ToCopy"
    " Transpose Unbind UnsafeSplit UnsafeView Unsqueeze View AdaptiveMaxPool2D Copy Copys"
)
