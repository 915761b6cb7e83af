"""Parsers of the settings that a run stores as text: the class to explain, and the rule that makes the masks."""

import math
from dataclasses import dataclass

from saltern.schemas.errors import UserError

# Default number and largest allowed number of each rule that takes one; `mean-std` may be negative.
_NUMBERED = {
    "mean": (1.0, math.inf),
    "mean-std": (0.0, math.inf),
    "quantile": (0.9, 1.0),
    "fixed": (0.5, 1.0),
    "max": (0.5, 1.0),
}
_PLAIN = ("fraction", "otsu")
RULES = "mean:ALPHA, mean-std:K, quantile:Q, fixed:T, max:ALPHA, fraction, otsu"


@dataclass(frozen=True)
class Target:
    """The class (or classes) that a map explains."""

    text: str  # as the user wrote it and run.json stores it: label | top1 | top:N | class:ID
    kind: str  # label | top1 | top | class
    number: int  # N or ID; 1 for label and top1

    @classmethod
    def parse(cls, text: str, classes: int) -> "Target":
        """Parse a target for a model of `classes` logits. Raises UserError if the model has no such class."""
        kind, colon, number = text.partition(":")
        if text in ("label", "top1"):
            return cls(text, kind, 1)
        if kind in ("top", "class") and colon and number.isdecimal():
            value = int(number)
            if (1 <= value <= classes) if kind == "top" else (value < classes):
                return cls(text, kind, value)
            allowed = f"N is 1..{classes}" if kind == "top" else f"the model has the classes 0..{classes - 1}"
            raise UserError(f"--target {text!r}: {allowed}")
        raise UserError(f"--target {text!r} is none of label, top1, top:N, class:ID")


@dataclass(frozen=True)
class Rule:
    """A discretization rule; saltern.pipeline.maps.discretize applies it."""

    text: str  # as the user wrote it and run.json stores it, as mean:1
    name: str
    number: float  # 0 if the rule takes none

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Parse a rule. Raises UserError with the choices if it is none of RULES."""
        name, colon, number = text.partition(":")
        if name in _PLAIN and not colon:
            return cls(text, name, 0.0)
        try:
            default, limit = _NUMBERED[name]
            value = float(number) if colon else default
        except (KeyError, ValueError):
            raise UserError(f"--discretize {text!r} is not a rule; the rules are {RULES}") from None
        if not math.isfinite(value) or (limit < math.inf and not 0 <= value <= limit):
            raise UserError(f"--discretize {text!r}: the number must be in 0..{limit}")
        return cls(text, name, value)
