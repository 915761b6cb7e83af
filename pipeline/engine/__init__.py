"""The engine: drives all shards of a run through local or Ray workers, and handles failures. Knows no job."""
