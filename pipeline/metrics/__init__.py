"""Numbers on a run's maps, masks and boxes."""
