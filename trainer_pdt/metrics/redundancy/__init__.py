"""The `evaluate` module `redundancy`."""

from .redundancy import Redundancy

__all__ = ["Redundancy"]
