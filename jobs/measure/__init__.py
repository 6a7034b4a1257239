"""Measurements: quality against cost, calibrations, a clip on several ranks. Knows no Ray."""
