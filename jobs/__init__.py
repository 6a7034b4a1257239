"""Batches and measurements: from what a person types to what lies on disk.

cli (what a person types), manifest (rows to requests), run (one run), in_process or gangs (who renders), output (what
lies on disk and when it counts), measure (quality, calibration, verify), console (lines and bars). Only `gangs` imports
ray, only `cli` imports click.
"""
