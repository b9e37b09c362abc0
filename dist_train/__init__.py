"""Draft models for speculative decoding, aligned with a chat LLM: pretrain, generate, distil, evaluate, export."""

__version__ = "0.1.0"
