"""Submission of a command to a Ray cluster."""
