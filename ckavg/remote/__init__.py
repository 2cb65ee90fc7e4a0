"""Stage *remote*: a run that is not here. Small files and headers come at once, weights when they are read."""
