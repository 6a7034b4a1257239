"""Meshes, sequence sharding, attention across ranks, consensus. Knows no model and no Ray.

Reading order: layout (arithmetic), mesh (process groups), tokens (who holds which), attention (the interface, and
ours), ulysses, ring, xfuser_attention, consensus (one decision), rows (feature maps), exchange (small things).
"""
