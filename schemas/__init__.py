"""The formats of a run on disk: Parquet schemas, receipts, config. Needs only pyarrow and the standard library."""
