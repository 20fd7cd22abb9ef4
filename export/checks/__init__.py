"""Whether artifacts compute the same as something else."""
