"""Batches: the manifest, the output folder, the command line. The only folder that imports ray.

Reading order: command_line (what a person types), manifest (rows to requests), batch (the loop over clips),
output_folder (what lies on disk and when it counts), progress.
"""
