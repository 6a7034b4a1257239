"""One page about what lies in a folder: from the files alone, while a driver runs or after.

In reading order: report.py (which page for which folder), batch.py (a batch's page), clips.py, event_log.py,
timeline.py, posters.py (its parts), page.py (from values to safe HTML). Knows no Ray, no PyTorch, no command line.
"""
