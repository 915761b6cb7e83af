"""Classifiers: loading, weights, layers, hooks, forward and backward passes."""
