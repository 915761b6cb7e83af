"""What a saliency map becomes: masks, boxes, stored bytes, positions in the original image."""
