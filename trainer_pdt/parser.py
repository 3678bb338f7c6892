"""Reads a recipe: YAML files and the command line, merged, checked and handed to flat dataclasses."""

import dataclasses
import difflib
import enum
import inspect
import json
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML with the numbers and booleans of YAML 1.2: `2e-4` is a float, `no` a word; a doubled key fails."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"`{key}` is set twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_RecipeLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|"
        r"\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as `--name value` words; lists give several words, mappings and booleans their JSON form."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(item if isinstance(item, str) else json.dumps(item) for item in values)]
    return words


def described(owner: type, name: str) -> str:
    """What `Args` in the docstring of a class say about a field; empty where they do not name it."""
    entries = re.split(r"\n(?= {4}\w)", inspect.getdoc(owner).partition("Args:")[2])
    for words in (" ".join(entry.split()) for entry in entries):
        names, _, meaning = words.partition("): ")
        if name in re.sub(r"\([^()]*\)?", "", names).replace(",", " ").split():
            return meaning
    return ""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping.

    Args:
        path (`str` or `Path`): File to read.

    Returns:
        `dict[str, Any]`: Its content; an empty file gives an empty mapping.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not a valid recipe: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: the top level must be a mapping of field names, got {type(content).__name__}")
    return content


class _Mismatch(Exception):
    """A value does not fit a type; the message is the type in words."""


def _number(value: Any, hint: type) -> Any:
    """Fit a number: an integral float may stand for an int (`1e3`), an int for a float; a bool never does."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (hint is int and value != value // 1):
        raise _Mismatch(hint.__name__)
    return hint(value)


def _choice(value: Any, hint: Any) -> Any:
    """Fit a `Literal` or an enum given by its value."""
    if get_origin(hint) is Literal:
        options = get_args(hint)
        if any(value == option and type(value) is type(option) for option in options):
            return value
    else:
        options = tuple(member.value for member in hint)
        if isinstance(value, hint) or value in options:
            return hint(value)
    raise _Mismatch(f"one of {', '.join(repr(option) for option in options)}")


def _union(value: Any, hint: Any) -> Any:
    """Fit the first member; members of the value's own type go first, so 1 stays an int in `float | int`."""
    members = sorted(get_args(hint), key=lambda member: type(value) is not (get_origin(member) or member))
    expected = []
    for member in members:
        try:
            return _fit(value, member)
        except _Mismatch as mismatch:
            expected.append(str(mismatch))
    raise _Mismatch(" or ".join(expected))


def _container(value: Any, hint: Any) -> Any:
    """Fit a list, tuple, set or mapping and its members."""
    kind, inner = get_origin(hint) or hint, [arg for arg in get_args(hint) if arg is not Ellipsis]
    if issubclass(kind, Mapping):
        if not isinstance(value, Mapping):
            raise _Mismatch("mapping")
        if not inner:
            return dict(value)
        return {_fit(key, inner[0]): _fit(item, inner[1]) for key, item in value.items()}
    if not isinstance(value, list | tuple | set):
        raise _Mismatch("list")
    if kind is tuple and Ellipsis not in get_args(hint) and inner and len(inner) != len(value):
        raise _Mismatch(f"list of {len(inner)} values")
    hints = inner if len(inner) > 1 else (inner or [Any]) * len(value)
    maker = kind if kind in (tuple, set, frozenset) else list
    return maker(_fit(item, item_hint) for item, item_hint in zip(value, hints, strict=True))


def _fit(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint` wants it, or raise `_Mismatch`."""
    origin = get_origin(hint)
    kind = origin or hint
    if hint is Any or (not isinstance(kind, type | types.UnionType) and origin not in (Union, Literal)):
        return value
    if origin in (Union, types.UnionType):
        return _union(value, hint)
    if origin is Literal or issubclass(kind, enum.Enum):
        return _choice(value, hint)
    if kind in (int, float):
        return _number(value, kind)
    if kind is not str and issubclass(kind, list | tuple | set | frozenset | Mapping | Sequence):
        return _container(value, hint)
    if not isinstance(value, kind):
        raise _Mismatch("null" if kind is type(None) else kind.__name__)
    return value


class RecipeParser:
    """Fill dataclasses from `--config` YAML files and the command line.

    Several `--config` files merge left to right, key by key; the command line wins. Keys are the flat, unique field
    names of the dataclasses; subclasses of `TrainingArguments` and `PeftConfig` are accepted as they are.

    Args:
        dataclass_types (`type`): Dataclasses to fill, in the order in which `parse` returns them.
        script (`str`, *optional*): What `--help` calls the script; defaults to the name of its file.

    Example:

    ```python
    >>> adapter, arguments = RecipeParser(PDTAdapterConfig, PDTTrainingArguments).parse()
    ```
    """

    def __init__(self, *dataclass_types: type, script: str | None = None):
        self.dataclass_types = dataclass_types
        self.script = script
        self.owners: dict[str, type] = {}
        self.fields: dict[str, dataclasses.Field] = {}
        self.hints: dict[str, Any] = {}
        for owner in dataclass_types:
            hints = get_type_hints(owner)
            for field in dataclasses.fields(owner):
                if not field.init:
                    continue
                if field.name in self.owners:
                    first = self.owners[field.name].__name__
                    raise ValueError(f"`{field.name}` is a field of {first} and of {owner.__name__}; names are unique")
                self.owners[field.name], self.fields[field.name] = owner, field
                self.hints[field.name] = hints[field.name]

    def parse(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse a command line.

        Args:
            args (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`):
                `--config FILE` (any number) and `--field value`; `--flag` alone means true, several values a list.

        Returns:
            `tuple`: One instance per dataclass type.
        """
        args = list(sys.argv[1:] if args is None else args)
        if "--help" in args or "-h" in args:
            sys.stdout.write(self.format_help())
            raise SystemExit(0)
        configs, overrides = _split(args)
        values: dict[str, tuple[Any, str]] = {}
        for path in configs:
            values.update({key: (value, str(path)) for key, value in load_yaml(path).items()})
        for key, words in overrides.items():
            self._known(key, "command line")
            values[key] = (self._from_words(key, words), "command line")
        return self._build(values)

    def parse_values(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Fill the dataclasses from a mapping of field names, with the same checks."""
        return self._build({key: (value, "values") for key, value in values.items()})

    def format_help(self) -> str:
        """Return one line per field: name, default and what it means."""
        script = self.script or Path(sys.argv[0]).name
        lines = [f"usage: {script} [--config FILE ...] [--field value ...]"]
        for owner in self.dataclass_types:
            lines += ["", f"{owner.__name__}:"]
            for field in (field for name, field in self.fields.items() if self.owners[name] is owner):
                value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                default = "required" if _is_required(field) else f"default {value!r}"
                meaning = " ".join((field.metadata.get("help") or described(owner, field.name)).split())
                lines.append(f"  --{field.name} ({default}) {meaning}".rstrip())
        return "\n".join(lines) + "\n"

    def _known(self, key: str, source: str) -> None:
        if key not in self.fields:
            close = difflib.get_close_matches(key, [*self.fields, "config"], n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"unknown field `{key}` ({source}){hint}")

    def _from_words(self, key: str, words: list[str]) -> Any:
        """Read the words after `--key`; a text field keeps its words as written (`--run_name 5`)."""
        if not words:
            return True
        values = [yaml.load(word, Loader=_RecipeLoader) for word in words]  # a SafeLoader
        candidates = [values[0], words[0], values, words] if len(words) == 1 else [values, words]
        for candidate in candidates:
            try:
                return _fit(candidate, self.hints[key])
            except _Mismatch:
                continue
        return candidates[0]

    def _build(self, values: Mapping[str, tuple[Any, str]]) -> tuple[Any, ...]:
        fitted: dict[str, Any] = {}
        for key, (value, source) in values.items():
            self._known(key, source)
            try:
                fitted[key] = _fit(value, self.hints[key])
            except _Mismatch as mismatch:
                raise ValueError(f"`{key}` = {value!r} ({source}): must be {mismatch}") from None
        missing = [name for name, field in self.fields.items() if _is_required(field) and name not in fitted]
        if missing:
            names = ", ".join(f"`{name}` ({self.owners[name].__name__})" for name in missing)
            raise ValueError(f"required and not set: {names}")
        return tuple(
            owner(**{key: value for key, value in fitted.items() if self.owners[key] is owner})
            for owner in self.dataclass_types
        )


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _split(args: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate `--config` files from overrides; the last override of a field counts."""
    configs: list[str] = []
    overrides: dict[str, list[str]] = {}
    words: list[str] | None = None
    for arg in args:
        if arg.startswith("--") and len(arg) > 2:
            name, equals, value = arg[2:].partition("=")
            name = name.replace("-", "_")
            words = configs if name == "config" else overrides.setdefault(name, [])
            if name != "config":
                words.clear()
            if equals:
                words.append(value)
        elif words is None:
            raise ValueError(f"unexpected {arg!r}: give `--config FILE` or `--field value`")
        else:
            words.append(arg)
    return configs, overrides
