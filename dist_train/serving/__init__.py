"""Inference servers: how they are asked, and what they count."""
