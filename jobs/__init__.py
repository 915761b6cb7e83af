"""One thin command a file; every heavy import stands inside its command."""
