"""Drives all shards of a run through workers, local or on Ray, whatever fails. Knows no job."""
