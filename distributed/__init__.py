"""Meshes, sequence sharding, attention across ranks, consensus. Knows no model and no Ray.

Reading order: layout.
"""
