"""Parsers of the settings that a run stores as text: the class to explain, and the rule that makes the masks."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from saltern.schemas.errors import UserError
from saltern.schemas.prompts import number_of

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

_DIGITS = 9  # more are no number that a target can have
_ALPHA = 0.6  # of finer targets: that of Finer-CAM (2501.11309) for the mean over several similar classes


@dataclass(frozen=True)
class Finer:
    """A comparison with similar classes: the score is z_c - alpha * mean of the logits of `count` classes like c."""

    count: int  # at least 1, and fewer than the model's classes
    alpha: float = _ALPHA  # strength, 0 or more


@dataclass(frozen=True)
class Target:
    """The class (or classes) that a map explains."""

    # As the user wrote it and run.json stores it: label | top1 | top:N | class:ID | prompt:NAME | finer:K[:ALPHA][@ANY]
    text: str
    kind: str  # label | top1 | top | class; a prompt is a class
    number: int  # N or ID; 1 for label and top1
    finer: Finer | None = None  # None: the logit of the class by itself

    @classmethod
    def parse(cls, text: str, classes: int, prompts: Sequence[str] = ()) -> "Target":
        """Parse a target for a model of `classes` logits. Raises UserError if the model has no such class.

        Args:
            prompts: the names of the classes of a model that compares images with texts.
        """
        kind, colon, number = text.partition(":")
        if kind == "finer":
            return cls._finer(text, classes, prompts)
        if text in ("label", "top1"):
            return cls(text, kind, 1)
        if kind in ("top", "class") and colon and number.isdecimal():
            value = int(number) if len(number) <= _DIGITS else classes + 1
            if (1 <= value <= classes) if kind == "top" else (value < classes):
                return cls(text, kind, value)
            allowed = f"N is 1..{classes}" if kind == "top" else f"the model has the classes 0..{classes - 1}"
            raise UserError(f"--target {text!r}: {allowed}")
        if kind == "prompt" and prompts:
            return cls(text, "class", number_of(number, prompts))
        if kind == "prompt":
            raise UserError(f"--target {text!r} needs a model of images and texts, and its --prompts; give class:ID")
        raise UserError(f"--target {text!r} is none of label, top1, top:N, class:ID, prompt:NAME, finer:K")

    @classmethod
    def _finer(cls, text: str, classes: int, prompts: Sequence[str]) -> "Target":
        """Parse finer:K, finer:K:ALPHA, and either with @ and another target: its class, in place of the label."""
        how, at, explained = text.partition("@")
        if classes < 2:
            raise UserError(f"--target {text!r} compares a class with others, and the model has one; give more prompts")
        base = cls.parse(explained or "label", classes, prompts)
        found = re.fullmatch(rf"finer:([0-9]{{1,{_DIGITS}}})(?::([0-9]{{1,{_DIGITS}}}(?:\.[0-9]+)?))?", how)
        finer = Finer(int(found[1]), float(found[2] or _ALPHA)) if found else Finer(0)
        if base.finer or (at and not explained) or not 1 <= finer.count < classes:
            raise UserError(
                f"--target {text!r} must be finer:K or finer:K:ALPHA, with K similar classes (1..{classes - 1}) and "
                f"ALPHA of 0 or more (below 1e{_DIGITS}, default {_ALPHA:g}); @ and another target explain that one's "
                "class: finer:3@top1"
            )
        return replace(base, text=text, finer=finer)


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
