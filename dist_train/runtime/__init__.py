"""This process: its place among all, the process group, launching others, progress, the run folder."""
