"""Manifests: the schema says what is written, and runs that cannot be compared are refused."""

import copy

import pytest

from trainer_pdt.decode_runs import read_run
from trainer_pdt.manifest import SCHEMA_FILE, check_manifest, differences, manifest_schema
from trainer_pdt.schema_check import check_schema
from trainer_pdt.telemetry import read_json, write_json

PARTS = ("trace", "plan", "commit", "rollback", "stall", "sensitivity", "stream", "token", "reading")


@pytest.fixture
def manifest():
    block = {"prompt": 0, "stream": 1, "round": 0, "attempt": 0, "start": 0, "end": 2, "agreement": 0.25}
    block |= {"coverage": {"0": 0.5}, "tokens": [4, 5], "call": 2, "time_s": 0.5}
    stream = {"name": "stream_0", "token_ids": [4, 5], "blocks": [[0, 2]], "coverage": {"0": 0.5}, "covered": [0]}
    settings = manifest_schema()["$defs"]["trace"]["properties"]["settings"]["required"]
    model = manifest_schema()["$defs"]["trace"]["properties"]["model"]["required"]
    described = {"instrumented_layers": [1, 2], "plan_vocab_size": 512, "plan_hash_salt": "salt"}
    return {
        "schema_version": "1.2",
        "command": "decode.py",
        "git": None,
        "packages": {"torch": "2.9", "deepspeed": None},
        "prompts": ["a"],
        "sections": [["b"]],
        "merged": ["b"],
        "trace": {
            "schema_version": "1.2",
            "settings": dict.fromkeys(settings),
            "model": {**dict.fromkeys(model), **described},
            "calls": 2,
            "timings": {"prefill_s": 0.1, "exchange_s": 0.1, "total_s": 0.5},
            "events": [
                {"kind": "plan", "prompt": 0, "items": [{"text": "a", "stream": 0, "bucket": 3}], "headers": [[1]]},
                {"kind": "rollback", **block},
                {"kind": "stall", **block},
                {"kind": "commit", **block, "forced": False},
            ],
            "streams": [[{**stream, "retries": 1, "finished": False}]],
        },
    }


def test_a_manifest_fits(manifest):
    check_manifest(manifest)


def test_a_manifest_is_read_as_a_run(manifest, tmp_path):
    for event in manifest["trace"]["events"][1:]:
        event |= {"stream": 0, "gate_scale": 0.5}
    run = read_run(write_json(tmp_path / "run.json", manifest))
    assert (run.plan_vocab_size, run.plan_hash_buckets, run.plan_hash_salt) == (512, 512, "salt")
    assert run.rollbacks == {"0/stream_0": [2]} and run.waits == 1 and run.forced == 0
    assert run.judged == [("0/stream_0", 0.25, True), ("0/stream_0", 0.25, False)]
    assert run.gates == {"0/stream_0": [0.5, 0.5, 0.5]}


def change(manifest, path, value):
    *parents, last = path
    for key in parents:
        manifest = manifest[key]
    if value is None:
        del manifest[last]
    else:
        manifest[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema_version"], "0.9", r"manifest\.schema_version must be one of \['1\.2'\], got \"0\.9\""),
        (["merged"], None, "manifest must have 'merged'"),
        (["extra"], 1, r"manifest\.extra is not allowed"),
        (["git"], {"sha": 3, "dirty": True}, r"manifest\.git fits none of the 2 forms allowed"),
        (["trace", "calls"], -1, r"manifest\.trace\.calls must be >= 0, got -1"),
        (["trace", "calls"], True, r"manifest\.trace\.calls must be integer, got true"),
        (["trace", "events", 3, "forced"], None, r"manifest\.trace\.events\[3\] fits none of the 5 forms"),
        (["trace", "events", 1, "agreement"], 1.5, r"manifest\.trace\.events\[1\] fits none of the 5 forms"),
        (["trace", "streams", 0, 0, "covered"], ["a"], r"covered\[0\] must be integer, got \"a\""),
        (["trace", "model", "plan_vocab_size"], 1, r"plan_vocab_size must be >= 2"),
    ],
)
def test_what_does_not_fit_is_named(manifest, path, value, message):
    change(manifest, path, value)
    with pytest.raises(ValueError, match=message):
        check_manifest(manifest)


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(ValueError, match="schema keyword 'pattern' at value is not supported"):
        check_schema("a", {"pattern": "b"})


def test_differences_pass_over_measurements(manifest):
    other = copy.deepcopy(manifest["trace"])
    other["timings"]["total_s"], other["events"][2]["time_s"], other["memory"] = 9.0, 9.0, {"tap_bytes": 3}
    other["events"][1]["agreement"] += 1e-7
    assert list(differences(manifest["trace"], other)) == []
    other["events"][2]["tokens"], other["calls"] = [4, 6, 7], "2"
    del other["streams"][0][0]["retries"]
    assert list(differences(manifest["trace"], other)) == [
        "trace.calls is 2 and '2'",
        "trace.events[2].tokens has 2 and 3 entries",
        "trace.events[2].tokens[1] is 5 and 6",
        "trace.streams[0][0].retries is in the first only",
    ]


def schema_tables():
    """The schema as Markdown: a table per kind of object, fields in the schema's order."""
    schema = manifest_schema()
    parts = {"manifest": schema, **{name: schema["$defs"][name] for name in PARTS}}
    lines = []
    for name, part in parts.items():
        lines += [f"### `{name}`", "", part["description"], "", "| field | always there | content |", "|---|---|---|"]
        inherited = schema["$defs"]["block"] if "$ref" in part else {"properties": {}, "required": []}
        required = {*part.get("required", ()), *inherited["required"]}
        for field, inner in {**part["properties"], **inherited["properties"]}.items():
            lines.append(f"| `{field}` | {'yes' if field in required else ''} | {inner['description']} |")
        lines.append("")
    return "\n".join(lines)


def test_the_documents_tables_are_the_schema():
    page = (SCHEMA_FILE.parents[1] / "docs/manifest.md").read_text(encoding="utf-8")
    written = page.split("<!-- schema -->\n")[1].split("<!-- end of schema -->")[0]
    assert written == schema_tables()


def test_the_schema_is_a_file_of_the_package():
    assert read_json(SCHEMA_FILE)["version"] == "1.2"
    assert '"trainer_pdt": ["*.json"]' in (SCHEMA_FILE.parents[1] / "setup.py").read_text()
