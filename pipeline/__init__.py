"""The pipeline (shards, decode, method, discretize, encode, write) and the engine that drives it."""
