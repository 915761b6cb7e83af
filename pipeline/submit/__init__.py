"""Sends a command to a Ray cluster."""
