"""Training batches in a fixed, resumable order."""
