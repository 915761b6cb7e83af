"""Adaptive poolings whose gradients repeat to the bit on a GPU."""

from torch import Tensor, nn


class EvenPool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling; its windows are reduced by a mean if all have one size.

    torch has no deterministic CUDA version of the general backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.output_size if isinstance(self.output_size, tuple) else (self.output_size,) * 2
        if rows is None or columns is None or x.shape[-2] % rows or x.shape[-1] % columns:
            return super().forward(x)
        height, width = x.shape[-2] // rows, x.shape[-1] // columns
        windows = x.reshape(*x.shape[:-2], rows, height, columns, width)
        return windows.mean((-3, -1))


def use_even_pools(model: nn.Module) -> None:
    """Make the model's adaptive average poolings to more than one cell even ones."""
    for module in model.modules():
        if type(module) is nn.AdaptiveAvgPool2d and module.output_size not in (1, (1, 1)):
            module.__class__ = EvenPool
