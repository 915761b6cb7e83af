"""Functions of torch, grouped by how relevance passes them."""

import torch

from saltern.pipeline.methods.functions import CLAMPS, OTHER_ACTIVATIONS, RECTIFIERS, functions

ACTIVATIONS = RECTIFIERS | CLAMPS | OTHER_ACTIVATIONS | functions("tanh tanh_ threshold threshold_")
DROPOUTS = functions("dropout dropout_ dropout2d feature_dropout alpha_dropout")
MAX_POOLS = functions("max_pool2d adaptive_max_pool2d")
MEAN_POOLS = functions("avg_pool2d adaptive_avg_pool2d adaptive_avg_pool1d mean")
SUMS = functions("add add_ __add__ __radd__ __iadd__")
SCALINGS = functions(
    "sub sub_ subtract __sub__ __rsub__ __isub__ rsub mul mul_ multiply __mul__ __rmul__ __imul__ div div_ divide"
    " true_divide __truediv__ __itruediv__ neg"
)
CONCATENATIONS = functions("cat concat concatenate")
# Constants in a product: its other factor takes all relevance.
GATES = functions("softmax sigmoid sigmoid_ hardsigmoid norm") | {torch.linalg.vector_norm, torch.linalg.norm}
SOFTMAX = functions("softmax")
PRODUCTS = functions("matmul __matmul__ __rmatmul__ mm bmm einsum")
# A division by a value that is a constant for relevance.
NORMALISATIONS = functions("normalize rms_norm")
LAYER_NORM = functions("layer_norm")
# These take only a shape from their input.
CONSTANTS = functions(
    "new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like rand_like randn_like"
)
# These only move values, so their own backward routes relevance.
ROUTES = functions(
    "view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to permute"
    " transpose swapaxes swapdims moveaxis movedim t contiguous clone chunk split split_with_sizes tensor_split unbind"
    " narrow select index_select stack roll flip pixel_shuffle pixel_unshuffle channel_shuffle __getitem__ pad to float"
    " double half bfloat16 type type_as cpu cuda detach masked_fill"
) | {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
# Names of autograd's nodes that a graph of relevance may hold.
_NODES = (
    "Accumulate Alias AsStrided Cat Clone ConstantPadNd CopySlices Expand Flip Index IndexSelect"
    " MaskedFill MaxPool2DWithIndices Narrow NativeChannelShuffle Permute PixelShuffle PixelUnshuffle ReflectionPad2D"
    " ReplicationPad2D Reshape ReshapeAlias Roll Select Slice Split SplitWithSizes Squeeze Stack Step T ToCopy"
    " Transpose Unbind UnsafeSplit UnsafeView Unsqueeze View AdaptiveMaxPool2D Copy Copys"
)
NODES = frozenset(_NODES.split())
