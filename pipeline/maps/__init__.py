"""From saliency maps to masks, boxes, stored bytes and positions in the original image."""
