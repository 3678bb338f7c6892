"""Manifests of decoding runs: written against a schema, compared, and read from the original system's files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from modeling_pdt.trace import MEASURED
from trainer_pdt.schema_check import check_schema
from trainer_pdt.telemetry import command_line, git_state, package_versions, read_json, write_json

SCHEMA_FILE = Path(__file__).with_name("decode_manifest.schema.json")
# Scores are sums that another kind of device rounds otherwise.
TOLERANCE = 1e-5


@lru_cache(maxsize=1)
def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of a manifest; `version` inside it is the version that manifests name."""
    return read_json(SCHEMA_FILE)


def check_manifest(manifest: Any) -> None:
    """Raises `ValueError` naming the place, the value and what the schema allows there."""
    check_schema(manifest, manifest_schema(), name="manifest")


def decode_manifest(
    trace: Mapping[str, Any],
    prompts: Sequence[str],
    sections: Sequence[Sequence[str]],
    merged: Sequence[str],
    **optional: Any,
) -> dict[str, Any]:
    """
    The record of a decoding run.

    Args:
        trace (`dict`): From `output.trace.to_manifest()`.
        prompts (`list[str]`): Rendered prompts.
        sections (`list[list[str]]`): Per prompt and stream, the section's text.
        merged (`list[str]`): The merged answers.
        optional: `reference_notes`, `tokenizer`, `replay_folder`; left out where `None`.
    """
    return {
        "schema_version": manifest_schema()["version"],
        "command": command_line(),
        "git": git_state(),
        "packages": package_versions(),
        "prompts": list(prompts),
        "sections": [list(texts) for texts in sections],
        "merged": list(merged),
        **{name: value for name, value in optional.items() if value is not None},
        "trace": dict(trace),
    }


def write_decode_manifest(path: str | Path, manifest: Mapping[str, Any]) -> Path:
    """Checks a manifest against the schema and writes it."""
    check_manifest(manifest)
    return write_json(path, manifest)


def read_decode_manifest(path: str | Path) -> dict[str, Any]:
    """Reads a manifest and checks it against the schema."""
    manifest = read_json(path)
    check_manifest(manifest)
    return manifest


def differences(first: Any, second: Any, place: str = "trace") -> Iterator[str]:
    """
    Where two traces of one call differ, apart from what was measured (`timings`, `memory`, `readings`, `time_s`).

    Args:
        first, second (`Any`): JSON values.
        place (`str`, *optional*, defaults to `"trace"`): Their name in what is yielded.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted((first.keys() | second.keys()) - set(MEASURED)):
            if key in first and key in second:
                yield from differences(first[key], second[key], f"{place}.{key}")
            else:
                yield f"{place}.{key} is in the {'second' if key in second else 'first'} only"
    elif isinstance(first, list) and isinstance(second, list):
        if len(first) != len(second):
            yield f"{place} has {len(first)} and {len(second)} entries"
        for index, (one, other) in enumerate(zip(first, second, strict=False)):
            yield from differences(one, other, f"{place}[{index}]")
    elif not _same(first, second):
        yield f"{place} is {first!r} and {second!r}"


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return first == second and type(first) is type(second)
