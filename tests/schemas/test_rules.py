"""Targets are parsed, and a wrong one is refused with what is allowed."""

import pytest

from saltern.schemas.errors import UserError
from saltern.schemas.rules import Target


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("top:0", "N is 1..5"),
        ("top:6", "N is 1..5"),
        ("class:5", "the model has the classes 0..4"),
        ("top", "is none of label, top1, top:N, class:ID"),
        ("top:-1", "is none of label, top1, top:N, class:ID"),
    ],
)
def test_a_wrong_target_is_refused_with_what_is_allowed(text: str, allowed: str) -> None:
    with pytest.raises(UserError, match=allowed):
        Target.parse(text, 5)


def test_the_first_and_the_last_that_a_model_has() -> None:
    for text, number in (("top:1", 1), ("top:5", 5), ("class:0", 0), ("class:4", 4)):
        assert Target.parse(text, 5).number == number
