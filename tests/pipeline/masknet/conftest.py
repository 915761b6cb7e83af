"""Fixtures of the mask network's tests."""

from staged import staged  # noqa: F401  (a fixture)
