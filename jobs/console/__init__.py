"""Lines, bars and tables on a person's terminal, and nothing else."""
