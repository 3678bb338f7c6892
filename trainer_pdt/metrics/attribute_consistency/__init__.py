"""The `evaluate` module `attribute_consistency`."""

from .attribute_consistency import AttributeConsistency

__all__ = ["AttributeConsistency"]
