"""The training loop, in one process or on Ray Train, with exact resume."""
