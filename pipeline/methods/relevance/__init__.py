"""Layer-wise relevance propagation and its relatives."""
