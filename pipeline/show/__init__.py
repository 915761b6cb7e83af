"""HTML pages of a run."""
