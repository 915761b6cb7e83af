"""CASM's mask network and its checkpoints, as inference needs them."""
