"""Stages on SLURM: checked and submitted, alone or chained; what their jobs leave behind, and how they stand."""
