"""The `evaluate` module `sibling_fact_recall`."""

from .sibling_fact_recall import SiblingFactRecall

__all__ = ["SiblingFactRecall"]
