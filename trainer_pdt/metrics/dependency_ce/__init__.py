"""The `evaluate` module `dependency_ce`."""

from .dependency_ce import DependencyCE

__all__ = ["DependencyCE"]
