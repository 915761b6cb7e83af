"""Numbers with their nouns and units."""

import pytest

from saltern.schemas.text import counted, in_bytes, in_time


def test_a_noun_follows_its_number() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
    assert counted(2, "class", "classes") == "2 classes"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (20_480, "20.5 kB"), (123_456, "123 kB"), (999_499, "999 kB"),
     (999_500, "1.0 MB"), (1.5e9, "1.5 GB"), (2e12, "2.0 TB"), (5e15, "5,000 TB")],
)  # fmt: skip
def test_bytes_have_a_unit_that_fits(size: float, text: str) -> None:
    assert in_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "1 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min"), (5970, "1.7 h"), (1e7, "2,777.8 h")],
)
def test_durations_have_a_unit_that_fits(seconds: float, text: str) -> None:
    assert in_time(seconds) == text
