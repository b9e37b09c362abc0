"""The two models: the target, the drafter, and whether one can draft for the other."""
