"""Train a localizer on the maps, masks and boxes of a run."""
