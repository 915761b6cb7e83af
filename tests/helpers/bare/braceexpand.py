"""The part of braceexpand that Saltern uses, for checks on a machine that lacks it and cannot install it."""

from collections.abc import Iterator


def braceexpand(pattern: str, escape: bool = True) -> Iterator[str]:
    """Yield a pattern that has no braces."""
    if "{" in pattern:
        raise ValueError(f"{pattern}: braces need the package braceexpand")
    yield pattern
