"""The `evaluate` module `note_usage`."""

from .note_usage import NoteUsage

__all__ = ["NoteUsage"]
