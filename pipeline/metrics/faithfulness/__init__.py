"""Measure how a classifier's answer follows a map: pixels removed, inserted, dimmed and imputed; statistics of maps."""
