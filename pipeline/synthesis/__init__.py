"""Jobs that make images: `attack` and `visualize-class`."""
