"""Measurements of a model from which cache policies are calibrated. Writes no file."""
