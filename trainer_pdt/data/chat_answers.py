"""Answers of a chat model as records: the JSON Schema that a request asks for is made of them, and they check it.

One description serves both sides, so what a server promises to keep and what is checked here never differ. Standard
library only.
"""

import json
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .schema import CoverageStatus

Record = TypeVar("Record")

_JSON_TYPES = {str: "string", int: "integer", float: "number"}


class InvalidAnswer(ValueError):
    """An answer that cannot be used.

    Args:
        reason (`str`): Short name in snake case: ``"malformed_json"``, ``"wrong_schema"``, ``"wrong_language"``, ...
        detail (`str`): What is wrong, told to the model when it is asked again.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class About:
    """What a field of an answer holds, and its range: of a number, of a text's characters, of a list's entries."""

    description: str
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class ItemAnswer:
    """A unit of content of a section."""

    cue: Annotated[str, About("One to four words that name a fact, for example: founding year", 1, 60)]
    text: Annotated[str, About("What to say, without the fact itself, for example: when the town was founded", 1, 200)]


@dataclass(frozen=True)
class StreamAnswer:
    """A section of the answer."""

    header: Annotated[str, About("Heading, at most eight words", 1, 120)]
    summary: Annotated[str, About("One sentence on what the section is about", 1, 300)]
    first_passage: Annotated[int, About("Number of the section's first passage", 1)]
    last_passage: Annotated[int, About("Number of the section's last passage", 1)]
    items: Annotated[tuple[ItemAnswer, ...], About("What the section tells", 1, 12)]


@dataclass(frozen=True)
class PlanAnswer:
    """Answer to a request for a plan."""

    prompt: Annotated[str, About("A request of one sentence that the whole text would answer", 1, 400)]
    streams: Annotated[tuple[StreamAnswer, ...], About("The sections, in the order of the passages", 2, 8)]


@dataclass(frozen=True)
class EntityAnswer:
    """A person, place or thing that the text names."""

    id: Annotated[str, About("e1, e2, ...", 1, 20)]
    name: Annotated[str, About("Name as written in the text", 1, 200)]
    type: Annotated[str, About("One word, for example: person", 1, 40)]
    aliases: Annotated[tuple[str, ...], About("Other names in the text", 0, 10)]


@dataclass(frozen=True)
class StatementAnswer:
    """A place where a section states what an item of the plan names."""

    item_id: Annotated[str, About("Id of the item", 1, 200)]
    section: Annotated[int, About("Number of the section that states it", 1)]
    quote: Annotated[str, About("The clause that states it, word for word", 1, 400)]
    value: Annotated[str, About("The shortest part of the quote that tells the fact, word for word", 1, 200)]
    entity_id: Annotated[str, About("Id of the entity that it is about, e0 for the subject of the whole text", 1, 20)]
    certainty: Annotated[float, About("How sure the text is, 0 to 1", 0, 1)]


@dataclass(frozen=True)
class CoverageAnswer:
    """How far a section covers an item that no value tells."""

    item_id: Annotated[str, About("Id of the item", 1, 200)]
    status: Annotated[CoverageStatus, About("covered, partial or missing")]


@dataclass(frozen=True)
class NotesAnswer:
    """Answer to a request for notes."""

    entities: Annotated[tuple[EntityAnswer, ...], About("Entities that statements are about or name", 0, 100)]
    statements: Annotated[tuple[StatementAnswer, ...], About("Every place that states an item", 1, 200)]
    coverage: Annotated[tuple[CoverageAnswer, ...], About("Items without a statement", 0, 100)]


@cache
def _fields(record: type) -> dict[str, tuple[Any, About]]:
    """Type and description of every field."""
    hints = get_type_hints(record, include_extras=True)
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()}


@cache
def answer_schema(record: type) -> dict[str, Any]:
    """The JSON Schema of an answer: every property required, no other one allowed."""
    properties = {name: _schema(hint, about) for name, (hint, about) in _fields(record).items()}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _schema(hint: Any, about: About) -> dict[str, Any]:
    described = {"description": about.description}
    if get_origin(hint) is Literal:
        return {"type": "string", "enum": list(get_args(hint)), **described}
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        items = answer_schema(inner) if is_dataclass(inner) else {"type": _JSON_TYPES[inner]}
        return {"type": "array", "items": items, "minItems": about.low, "maxItems": about.high, **described}
    limits = {} if hint is str else {"minimum": about.low, "maximum": about.high}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    return {"type": _JSON_TYPES[hint], **limits, **described}


def parse_answer(record: type[Record], text: str) -> Record:
    """
    The record that a JSON text holds.

    Args:
        record (`type`): [`PlanAnswer`] or [`NotesAnswer`].
        text (`str`): What the model wrote.

    Raises:
        [`InvalidAnswer`]: `malformed_json`, `wrong_schema` or `invalid_utf8`, with the place.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidAnswer("malformed_json", f"it is no JSON: {str(error)[:200]}.") from error
    return _parse(record, value, "answer")


def _parse(record: type, value: Any, place: str) -> Any:
    entries = _fields(record)
    if not isinstance(value, dict) or value.keys() != entries.keys():
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise InvalidAnswer("wrong_schema", f"{place} has {found}, must be an object with {sorted(entries)}.")
    return record(
        **{name: _fit(hint, about, value[name], f"{place}.{name}") for name, (hint, about) in entries.items()}
    )


def _fit(hint: Any, about: About, value: Any, place: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InvalidAnswer("wrong_schema", f"{place} is {value!r}, must be one of {', '.join(get_args(hint))}.")
        return value
    if get_origin(hint) is tuple:
        _check_type(value, list, "array", place)
        _check_range(len(value), about, f"number of entries of {place}")
        return tuple(_entry(get_args(hint)[0], entry, f"{place}[{n}]") for n, entry in enumerate(value))
    _check_type(value, int | float if hint is float else hint, _JSON_TYPES[hint], place)
    if hint is str:
        _check_text(value, place)
        value = value.strip()
        _check_range(len(value), about, f"number of characters of {place}")
        return value
    _check_range(value, about, place)
    return hint(value)


def _entry(kind: type, value: Any, place: str) -> Any:
    if is_dataclass(kind):
        return _parse(kind, value, place)
    _check_type(value, kind, _JSON_TYPES[kind], place)
    if kind is str:
        _check_text(value, place)
    return value


def _check_type(value: Any, kind: Any, name: str, place: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidAnswer("wrong_schema", f"{place} is {str(value)[:60]!r}, must be of type {name}.")


def _check_text(text: str, place: str) -> None:
    """JSON may hold half of a character (``\\ud83d`` of an emoji), which no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidAnswer("invalid_utf8", f"{place} has half of a character at character {error.start}.") from error


def _check_range(number: float, about: About, what: str) -> None:
    if (about.low is not None and number < about.low) or (about.high is not None and number > about.high):
        allowed = f"at least {about.low}" if about.high is None else f"{about.low} to {about.high}"
        raise InvalidAnswer("wrong_schema", f"{what} is {number}, must be {allowed}.")
