"""The contract of a method, and the registry.

Shape suffixes: B batch, C H W the network's input, K classes, h w a map's own grid.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from saltern.pipeline.methods import options
from saltern.pipeline.models import layers
from saltern.pipeline.models.passes import frozen
from saltern.schemas.errors import UserError

Maps = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Last:
    """What the last call found beside its maps; all on the device."""

    logits_BK: Tensor  # of the same forward pass, in the dtype that it ran in
    target_B: Tensor | None  # int64, the class explained; None for a class-agnostic method
    zero_B: Tensor  # bool: the map is zero everywhere (of several layers: any map is), and finite
    nonfinite_B: Tensor  # bool: the map or the logits held NaN or infinity; the map came back as zeros


class Method:
    """Base of all methods: `method(x_BCHW, target_B)` gives raw float32 maps at their native grid.

    A subclass declares its options as public class attributes with a type and a default (`steps: int = 32`), overrides
    the traits below where they differ, and writes `compute`; what it needs to make once goes into `prepare`.
    Between calls the model is as it was found: hooks, parameters' requires_grad and training flags change inside a
    call only, and are put back on the way out, also after an error.

    Args:
        model: gives logits (B, K); run in eval mode, on its device.
        layer: target layer by dotted name, or several where the method allows it; None = the model's default.
        given: the options.

    Raises:
        UserError: an unknown option or layer, or a model that the method cannot explain.
    """

    name: ClassVar[str] = ""  # in the registry
    needs_target: ClassVar[bool] = True  # False: class-agnostic
    heavy_tailed: ClassVar[bool] = False  # a uint8 scale ends at a quantile, not at the maximum
    default_map_dtype: ClassVar[str] = "float32"  # uint8 | float16 | float32, as stored
    layered: ClassVar[bool] = False  # has target layers
    many_layers: ClassVar[bool] = False  # and allows several in one pass

    model: nn.Module
    layer: list[str]  # target layers by dotted name; empty where the method has none
    options: dict[str, Any]  # full, as JSON values
    last: Last  # from the first call on
    seed_B: Tensor  # int64, on the device: of the call under way

    def __init__(self, model: nn.Module, *, layer: str | Sequence[str] | None = None, **given: Any) -> None:
        self.model = model
        self.options = self.complete(given)
        for name, value in self.options.items():
            setattr(self, name, value)
        if not self.layered and layer:
            raise UserError(f"{self.title()} has no target layer; leave out layer={layer!r}")
        with frozen(model):
            self.layer = layers.resolve(model, layer) if self.layered else []
            if len(self.layer) > 1 and not self.many_layers:
                raise UserError(f"{self.title()} takes one layer, not {len(self.layer)}")
            self.prepare()

    @classmethod
    def title(cls) -> str:
        """The name that messages use."""
        return cls.name or cls.__name__

    @classmethod
    def summary(cls) -> str:
        """One line on what the method does."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """All options with their defaults."""
        return {name: getattr(cls, name) for name in options.declared(cls, Method)}

    @classmethod
    def complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The options given, checked, and the others' defaults. Raises UserError."""
        return options.complete(given, options.declared(cls, Method), cls.defaults(), cls.title())

    def prepare(self) -> None:
        """Make once what every call needs. The model is in eval mode here, as in `compute`."""

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        """One batch: maps (B, h, w), one a layer; logits_BK; target_B, None for a class-agnostic method.

        Gradients are on; nothing requires one yet, parameters included, and x_BCHW may be made to.
        """
        raise NotImplementedError

    def __call__(self, x_BCHW: Tensor, target_B: Tensor | None = None, seed_B: Tensor | None = None) -> Maps:
        """Raw maps of a batch.

        Args:
            x_BCHW: normalised images, floating, on the model's device.
            target_B: int64, the class to explain for each sample; None = each sample's top-1.
            seed_B: int64, what each sample's noise follows, where the method draws any; None = zeros.

        Returns:
            map_Bhw float32 on the device; of several layers a tuple of them, in the order of `layer`.
        """
        _check(x_BCHW, target_B, seed_B)
        zeros = torch.zeros(len(x_BCHW), dtype=torch.int64, device=x_BCHW.device)
        self.seed_B = zeros if seed_B is None else seed_B.to(x_BCHW.device)
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.model):
            # A tensor made under inference mode can take part in no gradient.
            x_BCHW = x_BCHW.clone() if x_BCHW.is_inference() else x_BCHW.detach()
            found, logits_BK, target_B = self.compute(x_BCHW, target_B)
        logits_BK = logits_BK.detach()
        flat = found if isinstance(found, tuple) else (found,)
        maps = tuple(map_Bhw.detach().float() for map_Bhw in flat)
        nonfinite_B = ~logits_BK.isfinite().all(1)
        for map_Bhw in maps:
            nonfinite_B = nonfinite_B | ~map_Bhw.isfinite().all(2).all(1)
        maps = tuple(map_Bhw.masked_fill(nonfinite_B[:, None, None], 0) for map_Bhw in maps)
        zero_B = torch.stack([~map_Bhw.any(2).any(1) for map_Bhw in maps]).any(0) & ~nonfinite_B
        self.last = Last(logits_BK, None if target_B is None else target_B.detach(), zero_B, nonfinite_B)
        return maps[0] if len(maps) == 1 else maps

    def close(self) -> None:
        """Let go of what the method holds on the device."""
        for held in ("last", "seed_B"):
            self.__dict__.pop(held, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(x_BCHW: Tensor, target_B: Tensor | None, seed_B: Tensor | None) -> None:
    if x_BCHW.ndim != 4 or not x_BCHW.is_floating_point():
        raise UserError(f"images must be floating, (B, C, H, W), not {x_BCHW.dtype} {tuple(x_BCHW.shape)}")
    for what, given_B in (("targets", target_B), ("seeds", seed_B)):
        if given_B is not None and (given_B.dtype != torch.int64 or given_B.shape != x_BCHW.shape[:1]):
            raise UserError(
                f"{what} must be int64, one a sample ({len(x_BCHW)}), not {given_B.dtype} {tuple(given_B.shape)}"
            )


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: the method stands in the registry under this name."""

    def add(kind: type[M]) -> type[M]:
        kind.name = name
        METHODS[name] = kind
        return kind

    return add


def weighted_sum(weight_BK: Tensor, A_BKhw: Tensor) -> Tensor:
    """sum_k weight_k * A_k, map_Bhw."""
    return torch.einsum("bk,bkhw->bhw", weight_BK, A_BKhw)


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b == 0, 0, a / b)
