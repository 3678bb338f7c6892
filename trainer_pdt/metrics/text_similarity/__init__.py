"""The `evaluate` module `text_similarity`."""

from .text_similarity import TextSimilarity

__all__ = ["TextSimilarity"]
