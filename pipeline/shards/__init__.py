"""Input tars: list, read, decode and pack them."""
