"""The `evaluate` module `coverage`."""

from .coverage import Coverage

__all__ = ["Coverage"]
