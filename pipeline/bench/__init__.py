"""The measurements of `saltern bench`: sizes, and ratios of two sides that ran by turns in one process."""
