"""Checks of finished documents, each with a reason, and the measures of the quality report. Standard library only."""

from collections import Counter
from collections.abc import Iterable

from .notes import source_of
from .options import SplitOptions
from .schema import Document
from .teachers import Rejection

MAX_DOMAINS = 50
"""Domains that a report tells apart."""


def check_quality(document: Document, options: SplitOptions) -> None:
    """Raises [`Rejection`] for a document that is lopsided, contradicts itself, or does not follow its plan."""
    words = [len(stream.text.split()) for stream in document.streams]
    if min(words) < options.min_section_words:
        raise Rejection("short_section", f"{min(words)} words, at least {options.min_section_words}")
    if max(words) > options.max_length_ratio * min(words):
        raise Rejection("unbalanced", f"{min(words)} to {max(words)} words, at most {options.max_length_ratio} times")
    contradiction = next(_contradictions(document), None)
    if contradiction is not None:
        raise Rejection("contradiction", contradiction)
    stated = {span.item_id for stream in document.streams for span in stream.spans if span.owner == stream.stream_id}
    judged = {
        entry.item_id
        for stream in document.streams
        for entry in stream.notes.coverage
        if entry.status != "missing" and entry.provenance == "confirmed"
    }
    share = len(stated | judged) / len(document.items)
    if share < options.min_stated_items:
        raise Rejection("plan_not_followed", f"{share:.2f} of the items stated, at least {options.min_stated_items}")
    for stream in document.streams:
        own = [item.item_id for item in document.items if item.stream == stream.stream_id]
        if [entry.item_id for entry in stream.notes.coverage] != own:
            raise Rejection("coverage_catalogue", f"stream {stream.stream_id} must cover exactly its items")


def _contradictions(document: Document) -> Iterable[str]:
    """Repeated values that differ from what their owner states."""
    for stream in document.streams:
        for span in stream.spans:
            place = source_of(document.streams, stream.stream_id, span) if span.kind == "sibling" else None
            if place is not None:
                value = document.streams[place[0]].spans[place[1]].value
                if value != span.value and span.owner != stream.stream_id:
                    yield f"{span.cue!r} is {value!r} and, in stream {stream.stream_id}, {span.value!r}"


class QualityMeasures:
    """Counts of the documents of one split; [`QualityMeasures.report`] sums them up."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()
        self.streams: Counter[int] = Counter()

    def add(self, document: Document) -> None:
        """Counts a document."""
        self.domains[document.domain] += 1
        self.streams[len(document.streams)] += 1
        add = self.counts
        add["documents"] += 1
        add["items"] += len(document.items)
        names = Counter(entity.id for stream in document.streams for entity in stream.notes.entities)
        add["entities"] += len(names)
        add["shared_entities"] += sum(count > 1 for count in names.values())
        for stream in document.streams:
            add["sections"] += 1
            add["words"] += len(stream.text.split())
            add["note_words"] += len(stream.notes.text.split())
            add["facts"] += len(stream.notes.facts)
            add["snapshots"] += len(stream.snapshots)
            add["ready_references"] += sum(stream.ready)
            add["dependent_sections"] += any(span.kind == "sibling" for span in stream.spans)
            for span in stream.spans:
                add["references" if span.kind == "sibling" else "own_values"] += 1
                add["two_hop_references"] += span.kind == "sibling" and span.hops == 2
            for entry in stream.notes.coverage:
                add[f"items_{entry.status}"] += 1
                add["items_hint"] += entry.provenance == "hint"
            for noisy in stream.noisy_notes:
                add["noisy_variants"] += 1
                add["changed_variants"] += set(noisy.facts) != set(stream.notes.facts)
                add["wrong_facts"] += sum(fact.certainty < 1 for fact in noisy.facts)

    def update(self, other: "QualityMeasures") -> None:
        """Adds what another one has counted."""
        self.counts.update(other.counts)
        self.domains.update(other.domains)
        self.streams.update(other.streams)

    def _largest_domains(self) -> dict[str, int]:
        found = dict(sorted(self.domains.most_common(MAX_DOMAINS)))
        others = self.domains.total() - sum(found.values())
        return {**found, "(others)": others} if others else found

    def report(self) -> dict[str, object]:
        """Counts, and shares of them: what the rows of the quality report are made of."""
        counts = self.counts

        def share(part: str, whole: str) -> float | None:
            return round(counts[part] / counts[whole], 4) if counts[whole] else None

        return {
            "counts": dict(sorted(counts.items())),
            "domains": self._largest_domains(),
            "streams": {str(number): count for number, count in sorted(self.streams.items())},
            "shares": {
                "words per section": share("words", "sections"),
                "items per document": share("items", "documents"),
                "facts per section": share("facts", "sections"),
                "references per document": share("references", "documents"),
                "sections that need a sibling's fact": share("dependent_sections", "sections"),
                "references that their owner states in time": share("ready_references", "references"),
                "items stated": share("items_covered", "items"),
                "items without supervision": share("items_hint", "items"),
                "note words per section word": share("note_words", "words"),
                "entities named in several sections": share("shared_entities", "entities"),
                "noisy notes that differ": share("changed_variants", "noisy_variants"),
            },
        }
