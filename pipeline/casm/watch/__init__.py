"""Validation during training: numbers, curves, pages of masks."""
