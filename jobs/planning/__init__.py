"""Forecasts of a batch: which layouts of the GPUs at hand fit, how long each takes, what it costs. Pure: no processes.

Reading order: gpus and collectives (data sheets, measured collectives), cost_model (the law of a clip's time), exchange
(what its ranks send each other), anchors, study_file and sidecars (where times come from), evidence (which of them
counts), schedule (a batch on gangs), layouts (what is compared), plan (all of it). Nothing here is measured: it is read
from files that say where their numbers come from, or computed from them.
"""
