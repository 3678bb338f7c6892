"""The part of JSON Schema (2020-12) that the schemas of this package are written in."""

import json
from collections.abc import Callable, Iterator
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
ANNOTATIONS = ("$schema", "$id", "$defs", "title", "description", "version")
STRUCTURE = frozenset(("$ref", "properties", "additionalProperties", "items", *ANNOTATIONS))


def _is(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _type(value: Any, names: str | list[str], *_: Any) -> Iterator[str]:
    names = [names] if isinstance(names, str) else names
    if not any(_is(value, name) for name in names):
        yield f"must be {' or '.join(names)}"


def _enum(value: Any, allowed: list[Any], *_: Any) -> Iterator[str]:
    if value not in allowed:
        yield f"must be one of {allowed}"


def _bound(sign: int, word: str) -> Callable[..., Iterator[str]]:
    def check(value: Any, bound: float, *_: Any) -> Iterator[str]:
        if _is(value, "number") and sign * value < sign * bound:
            yield f"must be {word} {bound}"

    return check


def _required(value: Any, names: list[str], *_: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name in names:
            if name not in value:
                yield f"must have {name!r}"


KEYWORDS: dict[str, Callable[..., Iterator[str]]] = {
    "type": _type,
    "enum": _enum,
    "const": lambda value, only, *_: _enum(value, [only]),
    "minimum": _bound(1, ">="),
    "maximum": _bound(-1, "<="),
    "required": _required,
}


def _children(value: Any, schema: dict[str, Any], place: str) -> Iterator[tuple[Any, Any, str]]:
    """Values inside `value` with the schema of each; `False` stands for a key that is not allowed."""
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, item in value.items():
            yield item, known.get(key, others), f"{place}.{key}"
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield item, schema["items"], f"{place}[{index}]"


def _resolve(reference: str, root: dict[str, Any]) -> Any:
    target = root
    for part in reference.removeprefix("#/").split("/"):
        target = target[part]
    return target


def _own_problems(value: Any, schema: dict[str, Any], root: dict[str, Any], place: str) -> Iterator[str]:
    """What the keywords of one schema say about the value itself."""
    for keyword, expected in schema.items():
        if keyword in KEYWORDS:
            for problem in KEYWORDS[keyword](value, expected):
                yield f"{place} {problem}, got {json.dumps(value)[:80]}"
        elif keyword == "anyOf":
            if all(any(_problems(value, one, root, place)) for one in expected):
                yield f"{place} fits none of the {len(expected)} forms allowed, got {json.dumps(value)[:80]}"
        elif keyword not in STRUCTURE:
            raise ValueError(f"schema keyword {keyword!r} at {place} is not supported.")


def _problems(value: Any, schema: Any, root: dict[str, Any], place: str) -> Iterator[str]:
    if schema is False:
        yield f"{place} is not allowed"
    if isinstance(schema, bool):
        return
    if "$ref" in schema:
        yield from _problems(value, _resolve(schema["$ref"], root), root, place)
    yield from _own_problems(value, schema, root, place)
    for item, inner, where in _children(value, schema, place):
        yield from _problems(item, inner, root, where)


def check_schema(value: Any, schema: dict[str, Any], name: str = "value") -> None:
    """
    Checks a JSON value against a JSON Schema.

    Args:
        value (`Any`): Plain JSON value.
        schema (`dict`): `type`, `enum`, `const`, `minimum`, `maximum`, `required`, `properties`,
            `additionalProperties`, `items`, `anyOf` and `$ref` into itself.
        name (`str`, *optional*, defaults to `"value"`): What messages call the value.

    Raises:
        ValueError: Naming the first places that do not fit, or a keyword that is not supported.
    """
    problems = list(_problems(value, schema, schema, name))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more + ".")
