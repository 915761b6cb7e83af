"""The operations of torch that run, and those that do not repeat to the bit on a GPU."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = (
    "avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_max_pool2d_backward"
    " adaptive_max_pool3d_backward max_pool3d_with_indices_backward fractional_max_pool2d_backward"
    " fractional_max_pool3d_backward max_unpool2d max_unpool3d upsample_linear1d_backward upsample_bilinear2d_backward"
    " upsample_bicubic2d_backward upsample_trilinear3d_backward _upsample_bilinear2d_aa_backward"
    " _upsample_bicubic2d_aa_backward reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward"
    " nll_loss2d_forward nll_loss2d_backward _ctc_loss_backward _embedding_bag_backward _embedding_bag put put_ histc"
    " bincount median nanmedian kthvalue grid_sampler_2d_backward grid_sampler_3d_backward scatter_reduce"
    " scatter_reduce_"
)
_OF_FLOATS = frozenset(("cumsum", "cumsum_"))  # raise for floating tensors only, up to torch 2.11
# `torch.use_deterministic_algorithms` documents that these raise on CUDA tensors.
RAISING = frozenset(_NAMES.split()) | {f"{name} of floats" for name in _OF_FLOATS}
# The host waits for a GPU that runs these. The deterministic `scatter_add`, as of the backward pass of `gather`, takes
# two dozen kernels there, and a copy for which older versions of torch wait.
_WAITING = "_local_scalar_dense nonzero masked_select equal unique_dim _unique2 scatter_add scatter_add_"
WAITING = frozenset(_WAITING.split())


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        of_floats = name in _OF_FLOATS and result.is_floating_point()
        self.names.add(f"{name} of floats" if of_floats else name)
        return result


def operations(run: Callable[[], object]) -> set[str]:
    """Return the names of the operations that run, those of backward passes included."""
    with _Seen() as seen:
        run()
    return seen.names
