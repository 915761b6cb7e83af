"""Methods that weight activation maps."""
