"""The `evaluate` module `agreement`."""

from .agreement import Agreement

__all__ = ["Agreement"]
