"""The job `extract`: makes saliency rows from shards."""
