"""The errors that decide what the engine does next, and text that is safe to print."""

import unicodedata

# Control, format (such as right-to-left marks), surrogate and private characters, line and paragraph separators.
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def printable(text: str) -> str:
    """Return text in which every character that could steer a terminal or hide in a page is escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _ESCAPED else char for char in text
    )


class UserError(Exception):
    """A wrong call. The message is one line with the cause and the fix; the command prints it and exits with 2."""


class DamagedRunError(UserError):
    """A run.json that is not as it was written."""


class CollapseError(UserError):
    """A training whose masks collapse again and again. The command exits with 1."""


class ShardError(Exception):
    """A shard that cannot be read at all (cut, or not a tar). The shard fails with this reason and is not retried."""


class DeviceLostError(Exception):
    """A device that this process can no longer use. Its worker is replaced, and another worker gets the shard."""


class OutputError(Exception):
    """A run's folder that accepts no more data (full, read-only, removed). The run stops and keeps finished shards."""
