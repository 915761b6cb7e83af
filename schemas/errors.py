"""The errors that decide what the engine does next."""


class UserError(Exception):
    """A wrong call. The message is one line with the cause and the fix; the command prints it and exits with 2."""


class ShardError(Exception):
    """A shard that cannot be read at all (cut, or not a tar). The shard fails with this reason and is not retried."""


class DeviceLostError(Exception):
    """A device that this process can no longer use. Its worker is replaced, and another worker gets the shard."""


class OutputError(Exception):
    """A run's folder that accepts no more data (full, read-only, removed). The run stops and keeps finished shards."""
