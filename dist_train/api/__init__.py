"""The stages, callable from Python and from the command line: which there are, and how they are run."""
