"""Evaluation: decoding modes, scoring, benchmarks, and the report made of them."""
