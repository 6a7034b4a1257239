"""What a finished command means to the shell: docs/manifest.md says when."""

EXIT_DONE, EXIT_FAILED_CLIPS, EXIT_BAD_INPUT, EXIT_LEASED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130
