"""Checkpoints of the original PDT system: what is in them, and their heads, computed as the original did."""
