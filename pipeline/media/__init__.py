"""Pictures in, videos out, and how far two clips are apart. Knows no model."""
