"""The experiment on classes that no training saw."""
