"""Targets are parsed, and a wrong one is refused with what is allowed."""

import pytest

from saltern.schemas.errors import UserError
from saltern.schemas.rules import Finer, Target


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("top:0", "N is 1..5"),
        ("top:6", "N is 1..5"),
        ("class:5", "the model has the classes 0..4"),
        ("top", "is none of label, top1, top:N, class:ID"),
        ("top:-1", "is none of label, top1, top:N, class:ID, prompt:NAME, finer:K"),
        ("finer", "must be finer:K or finer:K:ALPHA"),
        ("finer:0", r"K similar classes \(1..4\)"),
        ("finer:5", r"K similar classes \(1..4\)"),
        ("finer:2:-1", "ALPHA of 0 or more"),
        ("finer:2:nan", "ALPHA of 0 or more"),
        ("finer:2:1:1", "must be finer:K or finer:K:ALPHA"),
        ("finer:2@", "finer:3@top1"),
        ("class:" + "9" * 5000, "the model has the classes 0..4"),
        ("top:" + "9" * 5000, "N is 1..5"),
        ("finer:" + "9" * 5000, "must be finer:K or finer:K:ALPHA"),
        ("finer:1:" + "9" * 400, "ALPHA of 0 or more"),
        ("finer:2@class:5", "the model has the classes 0..4"),
        ("finer:2@finer:2", "finer:3@top1"),
    ],
)
def test_a_wrong_target_is_refused_with_what_is_allowed(text: str, allowed: str) -> None:
    with pytest.raises(UserError, match=allowed):
        Target.parse(text, 5)


def test_the_first_and_the_last_that_a_model_has() -> None:
    for text, number in (("top:1", 1), ("top:5", 5), ("class:0", 0), ("class:4", 4)):
        assert Target.parse(text, 5).number == number


def test_a_finer_target_has_the_class_of_another_target() -> None:
    for text, kind, number, finer in (
        ("finer:3", "label", 1, Finer(3, 0.6)),
        ("finer:1:1", "label", 1, Finer(1, 1.0)),
        ("finer:4:0.25@top1", "top1", 1, Finer(4, 0.25)),
        ("finer:2@class:4", "class", 4, Finer(2, 0.6)),
        ("finer:2@top:5", "top", 5, Finer(2, 0.6)),
    ):
        assert Target.parse(text, 5) == Target(text, kind, number, finer)
    assert Target.parse("top1", 5).finer is None


@pytest.mark.parametrize("text", ["prompt:", "prompt", "prompt:a shark"])
def test_a_prompt_that_is_not_there_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(UserError, match="no prompt has this name; there are 'a c"):
        Target.parse(text, 2, ["a cod", "a crab"])


def test_a_finer_target_needs_two_classes() -> None:
    with pytest.raises(UserError, match="the model has one; give more prompts"):
        Target.parse("finer:1", 1, ["a cod"])
