"""Records, procedural worlds and publishing of datasets; knows neither torch nor the model."""

from .schema import Coverage, Document, Entity, Fact, Notes, NotesSnapshot, PlanItem, Span, Stream

__all__ = ["Coverage", "Document", "Entity", "Fact", "Notes", "NotesSnapshot", "PlanItem", "Span", "Stream"]
