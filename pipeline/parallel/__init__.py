"""Shards a transformer's tokens and a VAE's rows over the ranks of a gang. Knows no cache."""
