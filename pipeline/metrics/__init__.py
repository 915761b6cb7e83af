"""Measure a run's maps, masks and boxes against annotated boxes."""
