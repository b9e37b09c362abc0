"""Speculative decoding, in batches that are kept full."""
