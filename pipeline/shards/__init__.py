"""Input tars: listing, reading, decoding, packing."""
