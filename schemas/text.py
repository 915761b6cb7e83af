"""Numbers with their nouns and units, as messages give them."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as `1 row` or `2,000 rows`."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def in_bytes(size: float) -> str:
    """Return a number of bytes in the unit that fits, as `20 kB` or `1.5 GB`."""
    if size < 1000:
        return counted(round(size), "byte")
    units = ("kB", "MB", "GB", "TB")
    power = next((power for power in range(len(units)) if size < 999.5 * 1000 ** (power + 1)), len(units) - 1)
    size /= 1000 ** (power + 1)
    return f"{size:,.{int(size < 99.95)}f} {units[power]}"


def in_time(seconds: float) -> str:
    """Return a duration in the unit that fits, as `3 s`, `12 min` or `7.5 h`."""
    if seconds < 99.5:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:,.1f} h"
