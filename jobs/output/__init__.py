"""The output folder: what lies there, when a clip counts, whose it is. Knows no model and no Ray."""
