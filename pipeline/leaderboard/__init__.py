"""Methods against metrics over the same shards: one table and one page."""
