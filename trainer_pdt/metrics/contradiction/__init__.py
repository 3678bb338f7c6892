"""The `evaluate` module `contradiction`."""

from .contradiction import Contradiction

__all__ = ["Contradiction"]
