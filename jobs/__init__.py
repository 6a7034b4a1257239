"""Batches: the manifest, the output folder, the command line. The only folder that imports ray.

Reading order: command_line (what a person types), manifest (rows to requests), run (one run), batch (the loop over
clips in this process), own_files, output_folder and commit (what lies on disk and when it counts), lease (whose the
folder is);
for gangs of actors ray_batch (the driver's loop), retry (its rules), clip_queue, slots, gang_slot, finisher_slot,
stages (the actors) with rank_work and finisher_work (what they do), step_keeper, cluster, metrics; status and submit;
verify (a clip on one rank and on gangs), local_ranks, clip_bars, progress, gang_progress; calibration, quality,
quality_bench, trial_log, measure_progress (long measurements).
"""
