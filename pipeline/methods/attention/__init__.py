"""Methods on the attention of transformers."""
