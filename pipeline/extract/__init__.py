"""The job `extract`: one shard in, saliency rows out."""
