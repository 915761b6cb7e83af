"""The errors that have a meaning of their own: each decides what the engine does next."""


class UserError(Exception):
    """A wrong call. Its one line names what is wrong and the fix; the command prints that line and exits with 2."""


class ShardError(Exception):
    """A shard's data is broken as a whole (cut, or no tar). Retrying cannot help: the shard fails with this reason."""


class DeviceLostError(Exception):
    """The device does not answer in this process any more: its worker is made anew and the shard goes to another."""


class OutputError(Exception):
    """The run's folder takes no more (full, read-only, gone). The run stops; what stands is kept."""
