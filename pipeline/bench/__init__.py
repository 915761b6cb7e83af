"""What `saltern bench` measures. Every figure is a ratio of two sides that ran by turns in one process, or a size."""
