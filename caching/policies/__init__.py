"""One policy a file: when a step is skipped. Numbers in, a decision out."""
