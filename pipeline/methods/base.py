"""The contract of a saliency method.

Shape suffixes: B batch, C H W the network's input, K classes, h w a map's own grid.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from saltern.pipeline.methods import options
from saltern.pipeline.methods.contrast import Contrast
from saltern.pipeline.methods.options import OptionSpec
from saltern.pipeline.models import layers
from saltern.pipeline.models.halves import cast_once
from saltern.pipeline.models.passes import Score, frozen, pick_targets
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Finer
from saltern.schemas.sizes import Side

Maps = Tensor | tuple[Tensor, ...]
# Maps of each target, logits_BK, and each target: target_B or its score.
Each = tuple[Sequence[Maps], Tensor, Sequence[Tensor | Score | None]]


@dataclass(frozen=True)
class Last:
    """Further results of the last call, on the device."""

    logits_BK: Tensor  # of the same forward pass, in the dtype that it ran in
    target_B: Tensor | None  # int64, the class explained; None for a class-agnostic method
    zero_B: Tensor  # bool: the map is finite and zero everywhere (with several layers: any of the maps)
    nonfinite_B: Tensor  # bool: the map or the logits held NaN or infinity; the returned map is zeros
    others_BN: Tensor | None = None  # int64, the classes that a finer target compares it with, the most similar first


class Method:
    """Base of all methods: `method(x_BCHW, target_B)` returns raw float32 maps at their native grid.

    A subclass declares its options as public class attributes with a type and a default,
    `steps: Annotated[int, "Points on the path."] = 32`, overrides the traits below that differ, and implements
    `compute`, or `compute_each` if several targets can share their forward passes. `prepare` makes the data that every
    call needs. Outside of a call the model stays as it was: hooks, the parameters' requires_grad and training flags
    change only inside a call and are restored, also after an error.

    Args:
        model: returns logits (B, K); run in eval mode, on its device.
        layer: target layer by dotted name, or several if the method allows it; None = the model's default.
        input_side: pixels of the images to come, or height and width; None = the model's `image_size`, or 224.
        finer: compare each class with similar ones; None = explain the logit. Class-agnostic methods ignore it.
        given: the options.

    Raises:
        UserError: an unknown option or layer, or a model that the method cannot explain.
    """

    name: ClassVar[str] = ""  # in the registry
    cost: ClassVar[str] = ""  # of one image, in forward and backward passes
    needs_target: ClassVar[bool] = True  # False: class-agnostic
    comparable: ClassVar[bool] = False  # explains any `Score` that `scores` returns, finer ones too
    heavy_tailed: ClassVar[bool] = False  # uint8 storage scales to a quantile instead of the maximum
    default_map_dtype: ClassVar[str] = "float32"  # uint8 | float16 | float32, as stored
    default_rule: ClassVar[str] = "mean:1"  # that makes the masks
    layered: ClassVar[bool] = False  # has target layers
    layers_are_grids: ClassVar[bool] = True  # their outputs have the map's grid; False: the method checks the grid
    many_layers: ClassVar[bool] = False  # allows several target layers in one pass

    model: nn.Module
    layer: list[str]  # target layers by dotted name; empty if the method has none
    options: dict[str, Any]  # all of them, as JSON values
    input_side: Side | None  # pixels of the images to come, or height and width; None = unknown
    last: Last  # set by the first call
    seed_B: Tensor  # int64, on the device: of the current call

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | Sequence[str] | None = None,
        input_side: Side | None = None,
        finer: Finer | None = None,
        **given: Any,
    ) -> None:
        self.model, self.input_side = model, input_side
        self.options = self.complete(given)
        for name, value in self.options.items():
            setattr(self, name, value)
        if not self.layered and layer:
            raise UserError(f"{self.title()} has no target layer; leave out layer={layer!r}")
        if finer and self.needs_target and not self.comparable:
            raise UserError(f"{self.title()} cannot compare a class with similar ones; give a target other than finer")
        with frozen(model):
            self._contrast = Contrast(model, finer, input_side) if finer and self.needs_target else None
            self.layer = self.find_layers(layer) if self.layered else []
            if len(self.layer) > 1 and not self.many_layers:
                raise UserError(f"{self.title()} takes one layer, not {len(self.layer)}")
            self.prepare()

    @classmethod
    def title(cls) -> str:
        """Return the name that messages use."""
        return cls.name or cls.__name__

    @classmethod
    def summary(cls) -> str:
        """Return one line on what the method does."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def option_specs(cls) -> list[OptionSpec]:
        """Return (name, default, choices or type, help) of each option."""
        return options.specs(cls, Method)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the defaults of all options."""
        return {spec.name: spec.default for spec in cls.option_specs()}

    @classmethod
    def complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the given options, checked, and the defaults of the others. Raises UserError."""
        return options.complete(given, options.declared(cls, Method), cls.defaults(), cls.title())

    def find_layers(self, layer: str | Sequence[str] | None) -> list[str]:
        """Return the names of the target layers; the model's default if none is given. Raises UserError."""
        return layers.resolve(self.model, layer, self.input_side)

    def prepare(self) -> None:
        """Prepare the data that every call needs. The model is in eval mode here, as in `compute`."""

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        """Return the maps of a batch (B, h, w), one for each layer; logits_BK; target_B, None if class-agnostic.

        Gradients are on. Nothing requires a gradient yet, parameters included; x_BCHW may be made to.
        """
        raise NotImplementedError

    def scores(self, logits_BK: Tensor, target_B: Tensor | None, number: int) -> list[Score]:
        """Return the scores to explain: of the given target, or of each of the `number` most probable classes."""
        targets = pick_targets(logits_BK, target_B, number)
        if self._contrast is None:
            return [Score(class_B) for class_B in targets]
        return [self._contrast.score(logits_BK, class_B) for class_B in targets]

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        """Return what `compute` does for the given target, or for each of the `number` most probable classes."""
        maps, logits_BK, first_B = self.compute(x_BCHW, target_B)
        rest = logits_BK.detach().topk(number, 1).indices.unbind(1)[1:] if number > 1 else ()
        return [maps, *(self.compute(x_BCHW.detach(), other_B)[0] for other_B in rest)], logits_BK, [first_B, *rest]

    @classmethod
    def shares_forward(cls) -> bool:
        """Return whether several targets share their forward passes; otherwise each target has its own."""
        for kind in cls.__mro__:
            if "compute_each" in vars(kind):
                return kind is not Method
            if "compute" in vars(kind):  # of a subclass of a method that shares
                break
        return False

    def __call__(self, x_BCHW: Tensor, target_B: Tensor | None = None, seed_B: Tensor | None = None) -> Maps:
        """Return the raw maps of a batch.

        Args:
            x_BCHW: normalised images, floating, on the model's device.
            target_B: int64, the class to explain for each sample; None = each sample's top-1.
            seed_B: int64, seeds of each sample's noise if the method draws any; None = zeros.

        Returns:
            map_Bhw float32 on the device; for several layers a tuple of them, in the order of `layer`.
        """
        return self.explain(x_BCHW, target_B, seed_B)[0][0]

    def explain(
        self, x_BCHW: Tensor, target_B: Tensor | None = None, seed_B: Tensor | None = None, number: int = 1
    ) -> list[tuple[Maps, Last]]:
        """Return the maps of several targets, each with its further results; `last` is that of the first.

        Args:
            x_BCHW, target_B, seed_B: as for a call.
            number: of targets, the most probable classes; more than 1 only if no target is given.
        """
        with self.call(x_BCHW, target_B, seed_B) as x_BCHW:
            each = type(self).compute_each if self.shares_forward() else Method.compute_each
            computed = each(self, x_BCHW, target_B, number)
        return self.finish(*computed)

    @contextmanager
    def call(self, x_BCHW: Tensor, target_B: Tensor | None, seed_B: Tensor | None) -> Iterator[Tensor]:
        """Prepare the model and the method for one `compute_each`. Yields the images to give to it."""
        _check(x_BCHW, target_B, seed_B)
        zeros = torch.zeros(len(x_BCHW), dtype=torch.int64, device=x_BCHW.device)
        self.seed_B = zeros if seed_B is None else seed_B.to(x_BCHW.device)
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.model):
            # A tensor made under inference mode cannot take part in a gradient.
            yield x_BCHW.clone() if x_BCHW.is_inference() else x_BCHW.detach()

    def finish(
        self, raw: Sequence[Maps], logits_BK: Tensor, targets: Sequence[Tensor | Score | None]
    ) -> list[tuple[Maps, Last]]:
        """Return the results of `explain` from those of `compute_each`."""
        logits_BK = logits_BK.detach()
        found = [self._checked(maps, logits_BK, target) for maps, target in zip(raw, targets, strict=True)]
        self.last = found[0][1]
        return found

    def _checked(self, raw: Maps, logits_BK: Tensor, target: Tensor | Score | None) -> tuple[Maps, Last]:
        maps = tuple(map_Bhw.detach().float() for map_Bhw in (raw if isinstance(raw, tuple) else (raw,)))
        nonfinite_B = ~logits_BK.isfinite().all(1)
        for map_Bhw in maps:
            nonfinite_B = nonfinite_B | ~map_Bhw.isfinite().all(2).all(1)
        maps = tuple(map_Bhw.masked_fill(nonfinite_B[:, None, None], 0) for map_Bhw in maps)
        zero_B = torch.stack([~map_Bhw.any(2).any(1) for map_Bhw in maps]).any(0) & ~nonfinite_B
        score = Score(target.detach()) if isinstance(target, Tensor) else target
        explained = (None, None) if score is None else (score.class_B, score.others_BN)
        last = Last(logits_BK, explained[0], zero_B, nonfinite_B, explained[1])
        return maps[0] if len(maps) == 1 else maps, last

    def halve(self, x_BCHW: Tensor, dtype: torch.dtype) -> None:
        """Cast once the weights that autocast would cast at every call. From then on, call the method under autocast.

        Args:
            x_BCHW: any images, float32, on the device.
            dtype: bfloat16 | float16.
        """
        with torch.no_grad(), frozen(self.model), torch.autocast(x_BCHW.device.type, dtype):
            cast_once(self.networks(), lambda: self.passes(x_BCHW.clone()))

    def networks(self) -> Sequence[nn.Module]:
        """Return the networks that the method runs."""
        return [self.model]

    def passes(self, x_BCHW: Tensor) -> None:
        """Run all networks once."""
        self.model(x_BCHW)

    def trunk(self) -> Sequence[nn.Module]:
        """Return the large parts of the networks that every call runs without gradients and at the batch's shape."""
        return []

    def close(self) -> None:
        """Release what the method holds on the device."""
        for attribute in ("last", "seed_B"):
            self.__dict__.pop(attribute, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def weighted_sum(weight_BK: Tensor, A_BKhw: Tensor) -> Tensor:
    """Return sum_k weight_k * A_k, map_Bhw."""
    return torch.einsum("bk,bkhw->bhw", weight_BK, A_BKhw)


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / b)


def _check(x_BCHW: Tensor, target_B: Tensor | None, seed_B: Tensor | None) -> None:
    if x_BCHW.ndim != 4 or not x_BCHW.is_floating_point():
        raise UserError(f"images must be floating, (B, C, H, W), not {x_BCHW.dtype} {tuple(x_BCHW.shape)}")
    for plural, values_B in (("targets", target_B), ("seeds", seed_B)):
        if values_B is not None and (values_B.dtype != torch.int64 or values_B.shape != x_BCHW.shape[:1]):
            raise UserError(
                f"{plural} must be int64, one a sample ({len(x_BCHW)}), not {values_B.dtype} {tuple(values_B.shape)}"
            )
