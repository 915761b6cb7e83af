"""Compare methods at several layers of one model: a run for each, judged by the same metrics."""
