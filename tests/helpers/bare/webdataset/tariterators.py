"""Names of members."""


def base_plus_ext(path: str) -> tuple[str | None, str | None]:
    """Split a member's path at the first dot of its file name; (None, None) if it has none, or begins with it."""
    folder, slash, name = path.rpartition("/")
    base, dot, ext = name.partition(".")
    return (f"{folder}{slash}{base}", ext) if base and dot else (None, None)
