"""Generation: the target answers seed instructions."""
