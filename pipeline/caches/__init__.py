"""Installs a cache between a transformer's blocks or layers, on any diffusers pipeline. Knows no policy and no rank."""
