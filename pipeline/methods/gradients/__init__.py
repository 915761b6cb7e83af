"""Methods that read the gradient at the input, and occlusion."""
