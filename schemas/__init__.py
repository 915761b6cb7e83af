"""What stands on disk: the Parquet schema, the receipt, the run config. Needs pyarrow and the standard library only."""
