"""What lets a clip resume: step states, encoded prompts, the trace so far, in files that prove themselves."""
