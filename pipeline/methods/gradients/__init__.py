"""Methods that read the gradient at the input, occlusion and RISE."""
