"""Manifests in the forms that people have, to checked requests. Knows no output folder."""
