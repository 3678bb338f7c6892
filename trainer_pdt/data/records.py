"""Third stage: a teacher's notes, checked, as documents of the published schema."""

from collections.abc import Sequence

from .notes import annotate_streams
from .options import NotesOptions
from .schema import Document, PlanItem, Stream
from .teachers import Plan, Rejection, SectionNotes, SourceDocument

STATUSES = ("covered", "partial", "missing")


def build_document(
    source: SourceDocument, plan: Plan, sections: Sequence[SectionNotes], options: NotesOptions
) -> Document:
    """
    The published document without noisy notes.

    Args:
        source ([`SourceDocument`]): The source.
        plan ([`Plan`]): Its checked plan.
        sections (`Sequence[SectionNotes]`): The teacher's notes, one per stream. Raises [`Rejection`] where they break
            the notes schema.
        options ([`NotesOptions`]): Length of a round.
    """
    text = source.text
    streams = tuple(
        Stream(number, stream.header, stream.summary, text[stream.start : stream.end])
        for number, stream in enumerate(plan.streams)
    )
    if len(sections) != len(streams):
        raise Rejection("section_count", f"notes on {len(sections)} sections, the plan has {len(streams)}")
    items = {item.item_id: item for item in plan.items}
    names = _check_entities(sections)
    for stream, section in zip(streams, sections, strict=True):
        _check_spans(stream, section, items)
        _check_facts(stream, section, names)
        _check_coverage(stream, section, items)
    return Document(
        document_id=source.document_id,
        domain=source.domain,
        split_tags=source.tags,
        prompt=plan.prompt,
        items=plan.items,
        streams=annotate_streams(streams, plan.items, sections, options.round_words, options.max_snapshots),
    )


def _check_entities(sections: Sequence[SectionNotes]) -> set[str]:
    """Ids of all entities; one id is one entity in all sections."""
    names: dict[str, str] = {}
    for number, section in enumerate(sections):
        ids = [entity.id for entity in section.entities]
        if len(set(ids)) < len(ids):
            raise Rejection("doubled_entity", f"stream {number}: ids {ids}")
        for entity in section.entities:
            if not entity.id or not entity.name:
                raise Rejection("empty_entity", f"stream {number}: id {entity.id!r}, name {entity.name!r}")
            if names.setdefault(entity.id, entity.name) != entity.name:
                raise Rejection("ambiguous_entity", f"{entity.id!r} is {names[entity.id]!r} and {entity.name!r}")
    return set(names)


def _check_spans(stream: Stream, section: SectionNotes, items: dict[str, PlanItem]) -> None:
    end = 0
    for span in section.spans:
        where = f"stream {stream.stream_id}, span {span.start} to {span.end}"
        if span.start < end or span.end <= span.start or stream.text[span.start : span.end] != span.value:
            raise Rejection("bad_span", f"{where}: must hold {span.value!r}, in order, without overlap")
        end = span.end
        item = items.get(span.item_id)
        if item is None or item.stream != span.owner:
            raise Rejection("span_without_item", f"{where}: item {span.item_id!r} of stream {span.owner}")
        allowed = ("own", "sibling") if span.owner == stream.stream_id else ("sibling",)
        if span.kind not in allowed:
            raise Rejection("bad_span_kind", f"{where}: {span.kind!r}, must be one of {allowed}")
        if span.value.lower() in item.text.lower():
            raise Rejection("plan_holds_value", f"item {item.text!r} says {span.value!r}")


def _check_facts(stream: Stream, section: SectionNotes, entities: set[str]) -> None:
    for fact in section.facts:
        where = f"stream {stream.stream_id}, fact {fact.predicate!r}"
        if fact.subj_id not in entities:
            raise Rejection("unknown_entity", f"{where}: subject {fact.subj_id!r}")
        if not fact.predicate or not fact.object:
            raise Rejection("empty_fact", f"{where}: object {fact.object!r}")
        if not 0 <= fact.start < fact.end <= len(stream.text):
            raise Rejection("bad_evidence", f"{where}: {fact.start} to {fact.end} of {len(stream.text)} characters")
        if not 0 <= fact.certainty <= 1:
            raise Rejection("bad_certainty", f"{where}: {fact.certainty}, must be 0 to 1")


def _check_coverage(stream: Stream, section: SectionNotes, items: dict[str, PlanItem]) -> None:
    seen = set()
    for entry in section.coverage:
        where = f"stream {stream.stream_id}, coverage of {entry.item_id!r}"
        if entry.status not in STATUSES:
            raise Rejection("unknown_status", f"{where}: {entry.status!r}, must be one of {STATUSES}")
        if entry.item_id not in items or items[entry.item_id].stream != stream.stream_id or entry.item_id in seen:
            raise Rejection("bad_coverage", f"{where}: must be an item of the stream, once")
        seen.add(entry.item_id)
