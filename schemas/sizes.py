"""Sizes of the network's input: one number for a square, or height and width."""

from collections.abc import Sequence

from saltern.schemas.errors import UserError

Side = int | tuple[int, int]  # pixels: of a square; or height, width


def shape_of(side: Side) -> tuple[int, int]:
    """Return height and width."""
    return (side, side) if isinstance(side, int) else side


def side_of(side: int | Sequence[int]) -> Side:
    """Return the one form of a size: a number for a square."""
    if isinstance(side, int):
        return side
    height, width = side
    return height if height == width else (height, width)


def to_side(text: str) -> Side:
    """Parse `224`, or `224x448`, which is height x width. Raises ValueError if it is neither, or not above 0."""
    numbers = [int(word) for word in text.lower().split("x")]
    if min(numbers) < 1:
        raise ValueError(f"{text!r} is no size")
    return side_of(numbers if len(numbers) > 1 else numbers[0])


def square_of(side: Side) -> int:
    """Return the side of a square. Raises UserError if it is none."""
    if isinstance(side, int):
        return side
    raise UserError(f"this job takes square images only, not {side[0]} x {side[1]} pixels; give one number")
