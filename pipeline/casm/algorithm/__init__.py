"""One training step of CASM: losses, thinning, the pool of past classifiers, the controller of lambda."""
