"""A run's folder: writing, verifying, reading."""
