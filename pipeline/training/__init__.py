"""Train networks: batches in a fixed order, ranks, and the loop that resumes to the bit."""
