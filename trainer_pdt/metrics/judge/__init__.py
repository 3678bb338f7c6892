"""The `evaluate` module `judge`."""

from .judge import Judge

__all__ = ["Judge"]
