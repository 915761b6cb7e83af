"""Localization: how well maps and found boxes agree with true boxes and masks."""
