"""Evaluation: speculative decoding, block efficiency, memory-bound speed-up, token rate."""
