"""The chat teacher: a model behind any OpenAI-compatible server plans documents and takes notes.

One request per document for the plan, one for the notes. A model chooses passages, words cues and quotes; every place
is found again in the text here, so an answer can be wrong about what matters but never about what is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .chat_answers import (
    InvalidAnswer,
    NotesAnswer,
    PlanAnswer,
    StatementAnswer,
    StreamAnswer,
    answer_schema,
    parse_answer,
)
from .chat_caller import ChatCaller
from .chat_client import BYTES_PER_TOKEN, ChatRequest
from .chat_prompts import Messages, Passage, make_passages, notes_messages, plan_messages
from .language import language_of
from .schema import Coverage, Entity, Fact, PlanItem, Span
from .statements import cut_at_sentence, find_whole
from .teachers import Plan, Rejection, SectionNotes, SourceDocument, StreamPlan, TeacherStage

RULES_VERSION = 1
"""Raised when the reading of answers changes, so that finished stages are done again."""

MIN_STREAMS, MAX_STREAMS = 2, 8

TOKENS_PER_STREAM, TOKENS_PER_ITEM, TOKENS_PER_STATEMENT = 60, 30, 90
"""Output tokens, for estimates."""


@dataclass(frozen=True, kw_only=True)
class ChatTeacher(ChatCaller):
    """
    A [`Teacher`] that asks a chat model. Its other fields are those of [`ChatOptions`].

    Args:
        plan_model (`str`), notes_model (`str`): Names of the models that plan and that take notes.
        max_streams (`int`, *optional*, defaults to 4): Most streams per document, 2 to 8.
        max_items (`int`, *optional*, defaults to 4): Most plan items per stream, 1 to 12.
        max_section_words (`int`, *optional*, defaults to 200): Most words of a stream's section; what follows is left
            out, at the end of a sentence where there is one.
        max_document_words (`int`, *optional*, defaults to 3000): How much of a document's beginning a model reads.
        plan_tokens (`int`, *optional*, defaults to 1500), notes_tokens (`int`, *optional*, defaults to 3000): Tokens
            of the first attempt at an answer.
        temperature (`float`, *optional*, defaults to 0.0), seed (`int`, *optional*, defaults to 0): Of sampling.
    """

    plan_model: str
    notes_model: str
    max_streams: int = 4
    max_items: int = 4
    max_section_words: int = 200
    max_document_words: int = 3000
    plan_tokens: int = 1500
    notes_tokens: int = 3000
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            **{"max_streams": (MIN_STREAMS, MAX_STREAMS), "max_items": (1, 12), "temperature": (0, 2)},
            **dict.fromkeys(
                ("max_section_words", "max_document_words", "plan_tokens", "notes_tokens"), (1, 1_000_000)
            ),
            **{"max_answer_tokens": (max(self.plan_tokens, self.notes_tokens), 10_000_000)},
        }
        self.check(ranges, {self.plan_model, self.notes_model})

    @property
    def concurrency(self) -> int:
        """Documents in hand: twice the requests in flight, so that reading an answer leaves no place empty."""
        return 2 * self.max_concurrency

    def fingerprint(self, stage: TeacherStage) -> Mapping[str, Any]:
        """What changes an answer; neither limits nor the place of the server."""
        names = {
            "plans": ("plan_model", "max_streams", "max_items", "max_section_words", "max_document_words"),
            "notes": ("notes_model",),
        }[stage]
        chosen = {name: getattr(self, name) for name in (*names, "temperature", "seed")}
        return {"teacher": "chat", "rules": RULES_VERSION, **chosen}

    def estimate(self, source: SourceDocument) -> Mapping[str, float]:
        """
        Requests, tokens and US dollars of one document without any failure.

        Input is counted at 4 UTF-8 bytes per token; for the output, a document is taken to have `max_streams`
        streams of `max_items` items, and every second item to be repeated once. A text of one passage takes nothing.
        """
        passages = make_passages(source, self.max_document_words)
        if len(passages) < MIN_STREAMS:
            return {}
        plan = self._request(PlanAnswer, self._plan_messages(source, passages))
        streams = min(self.max_streams, len(passages))
        items = streams * self.max_items
        planned = TOKENS_PER_STREAM * streams + TOKENS_PER_ITEM * items
        read = plan.bytes() / BYTES_PER_TOKEN
        uses = (
            self.usage(self.plan_model, read, planned),
            self.usage(self.notes_model, read + planned, TOKENS_PER_STATEMENT * items * 1.5),
        )
        return {
            "requests": 2,
            "input_tokens": sum(use.input_tokens for use in uses),
            "output_tokens": sum(use.output_tokens for use in uses),
            "cost_usd": sum(use.cost_usd for use in uses),
        }

    def plan(self, source: SourceDocument) -> Plan:
        """
        The plan that the model makes.

        Raises [`Rejection`]: `too_few_sections` for a text of one passage, without a request; else with the reason of
        the last attempt.
        """
        passages = make_passages(source, self.max_document_words)
        if len(passages) < MIN_STREAMS:
            raise Rejection("too_few_sections", f"{len(passages)} passage(s) of text, must be {MIN_STREAMS}.")
        request = self._request(PlanAnswer, self._plan_messages(source, passages))
        return self.ask(request, partial(self._read_plan, source, passages))

    def notes(self, source: SourceDocument, plan: Plan) -> tuple[SectionNotes, ...]:
        """The notes that the model takes. Raises [`Rejection`] with the reason of the last attempt."""
        request = self._request(NotesAnswer, notes_messages(source, plan))
        return self.ask(request, partial(read_notes, source, plan))

    def _plan_messages(self, source: SourceDocument, passages: Sequence[Passage]) -> Messages:
        return plan_messages(source, passages, self.max_streams, self.max_items, self.max_section_words)

    def _request(self, record: type, messages: Messages) -> ChatRequest:
        is_plan = record is PlanAnswer
        model, tokens = (self.plan_model, self.plan_tokens) if is_plan else (self.notes_model, self.notes_tokens)
        schema = answer_schema(record)
        return ChatRequest(model, messages, schema, tokens, self.temperature, self.seed, RULES_VERSION)

    def _read_plan(self, source: SourceDocument, passages: Sequence[Passage], text: str) -> Plan:
        answer = parse_answer(PlanAnswer, text)
        if len(answer.streams) > self.max_streams:
            raise InvalidAnswer(
                "wrong_schema", f"there are {len(answer.streams)} sections, at most {self.max_streams}."
            )
        check_passages(answer.streams, len(passages))
        check_language(source, answer)
        streams, items = [], []
        for number, stream in enumerate(answer.streams):
            start, end = passages[stream.first_passage - 1].start, passages[stream.last_passage - 1].end
            end = start + cut_at_sentence(source.text[start:end], self.max_section_words)
            streams.append(StreamPlan(_line(stream.header), _line(stream.summary), start, end))
            cues = {" ".join(item.cue.replace("/", " ").split()): item.text for item in stream.items[: self.max_items]}
            items += [PlanItem(f"s{number}/{cue}", _line(line), number) for cue, line in cues.items()]
        return Plan(source.prompt or _line(answer.prompt), tuple(items), tuple(streams))


def check_passages(streams: Sequence[StreamAnswer], count: int) -> None:
    """Sections are runs of existing passages, in order and without overlap. Raises [`InvalidAnswer`]."""
    after = 1
    for number, stream in enumerate(streams, start=1):
        if not after <= stream.first_passage <= stream.last_passage <= count:
            raise InvalidAnswer(
                "wrong_passages",
                f"section {number} is passages {stream.first_passage} to {stream.last_passage}, must be a run within "
                f"{after} to {count}.",
            )
        after = stream.last_passage + 1


def check_language(source: SourceDocument, answer: PlanAnswer) -> None:
    """The plan is in the language of the document, where both can be told. Raises [`InvalidAnswer`]."""
    lines = [answer.prompt] if source.prompt is None else []
    for stream in answer.streams:
        lines += [stream.header, stream.summary, *(item.text for item in stream.items)]
    wanted, found = language_of(source.text), language_of("\n".join(lines))
    if wanted and found and wanted != found:
        raise InvalidAnswer("wrong_language", f"the answer is in {found!r}, must be in {wanted!r} like the text.")


def read_notes(source: SourceDocument, plan: Plan, text: str) -> tuple[SectionNotes, ...]:
    """
    The notes of an answer, as far as the sections hold them.

    A statement counts if its quote and value stand in its section, its value is not told by request, headings or
    items, belongs to no other item and, for a repetition, equals what the owner states. Raises [`InvalidAnswer`] if
    most statements are not in the text.
    """
    answer = parse_answer(NotesAnswer, text)
    sections = [source.text[stream.start : stream.end] for stream in plan.streams]
    told = "\n".join([plan.prompt, *(s.header for s in plan.streams), *(item.text for item in plan.items)]).lower()
    owners = {item.item_id: item.stream for item in plan.items}
    lines = {item.item_id: item.text.lower() for item in plan.items}
    entities = {"e0": Entity("e0", source.title or plan.prompt, source.domain)}
    entities |= {e.id: Entity(e.id, e.name, e.type, e.aliases) for e in answer.entities if e.id not in entities}
    notes = [_Section(number, section) for number, section in enumerate(sections)]
    values: dict[str, str] = {}
    refused = []
    for statement in sorted(answer.statements, key=lambda s: s.section - 1 != owners.get(s.item_id)):
        owner, number = owners.get(statement.item_id), statement.section - 1
        if owner is None or number >= len(notes) or notes[number].find(statement) is None:
            refused.append(statement)
            continue
        value = statement.value
        fits = value not in values.values() if number == owner else values.get(statement.item_id) == value
        is_told = value.lower() in lines[statement.item_id] or find_whole(value.lower(), told) >= 0
        if fits and not is_told and notes[number].add(statement, owner, entities):
            values.setdefault(statement.item_id, value)
    if not values:
        raise InvalidAnswer("unfounded_notes", "no section states a planned item in the words that you quote.")
    if len(refused) > len(answer.statements) / 2:
        shown = "; ".join(f"{s.item_id}: {s.quote[:60]!r} in section {s.section}" for s in refused[:3])
        raise InvalidAnswer("unfounded_notes", f"most quotes or values are not in their sections, among them {shown}.")
    judged = {entry.item_id: entry.status for entry in answer.coverage if entry.item_id not in values}
    return tuple(section.notes(entities, owners, judged) for section in notes)


class _Section:
    """Spans and facts of one section while an answer is read."""

    def __init__(self, number: int, text: str) -> None:
        self.number, self.text = number, text
        self.stated: list[tuple[Span, Fact]] = []

    def find(self, statement: StatementAnswer) -> tuple[int, int] | None:
        """Character range of the value within its quote, if the text holds them."""
        quote, place = self.text.find(statement.quote), find_whole(statement.value, statement.quote)
        return (quote + place, quote + place + len(statement.value)) if min(quote, place) >= 0 else None

    def add(self, statement: StatementAnswer, owner: int, entities: Mapping[str, Entity]) -> bool:
        """Notes a statement that was found, unless its item or its place has one already; whether it did."""
        start, end = self.find(statement) or (0, 0)
        item_id, value = statement.item_id, statement.value
        if any(span.item_id == item_id or (start < span.end and end > span.start) for span, _ in self.stated):
            return False
        cue = item_id.split("/", 1)[1]
        subject = statement.entity_id if statement.entity_id in entities else "e0"
        span = Span(start, end, "own" if owner == self.number else "sibling", cue, value, item_id, owner)
        self.stated.append((span, Fact(subject, cue, value, start, end, statement.certainty)))
        return True

    def notes(
        self, entities: Mapping[str, Entity], owners: Mapping[str, int], judged: Mapping[str, Any]
    ) -> SectionNotes:
        """What was added, in order of the text."""
        self.stated.sort(key=lambda pair: pair[0].start)
        subjects = {fact.subj_id for _, fact in self.stated}
        return SectionNotes(
            tuple(e for e in entities.values() if e.id in subjects or find_whole(e.name, self.text) >= 0),
            tuple(fact for _, fact in self.stated),
            tuple(span for span, _ in self.stated),
            tuple(
                Coverage(item, judged[item])
                for item, owner in owners.items()
                if item in judged and owner == self.number
            ),
        )


def _line(text: str) -> str:
    return " ".join(text.split())
