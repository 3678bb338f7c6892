"""recipes/decode.py on a tiny random model, and the view that it shows."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from modeling_pdt import PDTForParallelDecoding, PDTGenerationConfig
from modeling_pdt.interventions import make_interventions
from modeling_pdt.policies import CadencePolicy
from recipes import decode, replay
from trainer_pdt.live_view import LiveView
from trainer_pdt.manifest import differences, read_decode_manifest
from trainer_pdt.parser import RecipeParser
from trainer_pdt.telemetry import read_json, write_json
from trainer_pdt.trunk_corpus import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(600, num_documents=100)


@pytest.fixture
def model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    model = PDTForParallelDecoding.from_trunk(LlamaForCausalLM(config), notes_dim=16, block_size=4).eval()
    model.config._adapter_config.trained_parts = ["agreement"]
    return model


def arguments(*words):
    return RecipeParser(decode.DecodeArguments).parse(["--model", "unused", *words])[0]


def console(width=100, terminal=False):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


def test_the_answer_is_shown_and_recorded(model, tokenizer, tmp_path):
    screen, manifest = console(), tmp_path / "folder/manifest.json"
    options = ["--plan", "none", "--headers", "Farming", "Places", "--num_streams", "2", "--max_new_tokens", "10"]
    gate = ["--agreement_threshold", "1.0", "--interventions", "stale", "--manifest", str(manifest), "--seed", "3"]
    output = decode.decode(model, tokenizer, arguments("--prompt", "Describe Velmar.", *options, *gate), screen)
    written = screen.file.getvalue()
    record = json.loads(manifest.read_text())
    assert record["prompts"] == ["Describe Velmar.\n"]
    assert [len(sections) for sections in record["sections"]] == [2]
    assert record["trace"]["settings"]["interventions"] == ["stale"]
    assert written.count("committed:") == sum(len(row.blocks) for row in output.streams[0])
    assert written.count("rolled back:") == sum(row.retries for row in output.streams[0]) > 0
    assert written.index("merged answer") > written.rindex("committed:")
    assert record["merged"][0].startswith("## Farming\n") and "## Places\n" in record["merged"][0]
    assert record["merged"][0].splitlines()[0] in written[written.index("merged answer") :]


def test_a_file_of_requests_is_one_batch(model, tokenizer, tmp_path):
    file = tmp_path / "requests.txt"
    file.write_text("Describe Velmar.\n\nDescribe Tanmar in three parts.\n")
    given = ["--prompt_file", str(file), "--plan", "planner", "--max_new_tokens", "5", "--temperature", "0"]
    screen = console()
    output = decode.decode(model, tokenizer, arguments(*given, "--interventions", "swap"), screen)
    assert [len(rows) for rows in output.streams] == [3, 3]
    assert "prompt 1 stream 2 committed:" in screen.file.getvalue()
    assert not output.trace.settings["do_sample"]


@pytest.mark.parametrize("words", [[], ["--prompt", "a", "--prompt_file", "b"]])
def test_one_source_of_requests(words):
    with pytest.raises(ValueError, match="give exactly one of `prompt` and `prompt_file`"):
        arguments(*words).requests()


def test_the_recipe_runs_from_a_saved_folder(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path, include_trunk=True)
    tokenizer.save_pretrained(tmp_path)
    words = ["--prompt", "Describe Velmar.", "--plan", "none", "--max_new_tokens", "4", "--threads"]
    decode.main(["--model", str(tmp_path), *words, str(torch.get_num_threads())])
    assert "merged answer" in capsys.readouterr().out


def test_a_run_leaves_its_files_and_can_be_replayed(model, tokenizer, tmp_path, capsys):
    names = {"manifest": "out/manifest.json", "stream_jsonl": "out/tokens.jsonl", "replay_folder": "out/replay"}
    words = [word for name, file in names.items() for word in (f"--{name}", str(tmp_path / file))]
    notes = tmp_path / "notes.yaml"
    notes.write_text("stream_0: [barley]\n")
    plan = ["--plan_texts", '{"text": "main crop", "stream": 0}', '{"text": "mayor"}', "--seed_texts", "a", "b", "c"]
    options = ["--max_new_tokens", "10", "--token_records", "--reading_records", "--memory_report", "--top_p", "0.9"]
    given = arguments("--prompt", "Velmar.", *words, *plan, *options, "--reference_notes", str(notes))
    given.agreement_threshold, given.max_retries = 0.999, 2
    output = decode.decode(model, tokenizer, given, console())
    record = read_decode_manifest(tmp_path / "out/manifest.json")
    assert record["reference_notes"] == {"stream_0": ["barley"]}
    lines = [json.loads(line)["event"] for line in (tmp_path / "out/tokens.jsonl").read_text().splitlines()]
    assert lines.count("token") == len(record["trace"]["tokens"])
    assert record["trace"]["memory"]["cache_bytes"] > 0
    assert any(reading["notes"] for reading in record["trace"]["readings"])
    assert record["trace"]["settings"]["plan"] == "external"
    items = record["trace"]["events"][0]["items"]
    assert items[0]["bucket"] > 0 and items[1] == {"text": "mayor", "stream": None, "bucket": None}
    assert output.trace.of_kind("rollback")
    folder = ["--replay_folder", str(tmp_path / "out/replay")]
    replay.main([*folder, "--trace", str(tmp_path / "trace.json")])
    assert "replay: identical" in capsys.readouterr().out
    assert list(differences(record["trace"], read_json(tmp_path / "trace.json"))) == []
    stored = read_json(tmp_path / "out/replay/replay.json")
    stored["trace"]["events"][-1]["tokens"][0] += 1
    write_json(tmp_path / "out/replay/replay.json", stored)
    with pytest.raises(SystemExit, match=r"replay: differs\n  trace\.events\[\d+\]\.tokens\[0\] is"):
        replay.main(folder)


def test_every_option_of_decoding_is_an_option_of_the_recipe():
    options = set(vars(PDTGenerationConfig())) - set(vars(GenerationConfig()))
    fields = {field.name for field in dataclasses.fields(decode.DecodeArguments)}
    assert options <= fields
    text = RecipeParser(decode.DecodeArguments).format_help()
    assert "--bus_lag (default None) Rounds between writing and reading.\n" in text
    given = arguments("--prompt", "a", "--bus_lag", "2", "--retry_policy", "stale")
    chosen = given.generate_arguments()
    assert (chosen["bus_lag"], chosen["retry_policy"]) == (2, "stale") and "block_size" not in chosen


def test_the_originals_flags_all_have_a_row():
    text = (ROOT / "docs/decoding.md").read_text(encoding="utf-8").split("## Options of the recipe")[1]
    rows = re.findall(r"^\| `(--\S+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == len(dict(rows)) == 47
    fields = {field.name for field in dataclasses.fields(decode.DecodeArguments)} | {"config"}
    for flag, equivalent in rows:
        named = set(re.findall(r"`--(\w+)", equivalent)) | set(re.findall(r"`(\w+):` in a", equivalent))
        assert named <= fields, flag
        assert named or equivalent.startswith(("none: ", "the view", "`timings", "[`recipes/")), flag
        assert all((ROOT / recipe).is_file() for recipe in re.findall(r"^\[`(recipes/\S+)`\]", equivalent)), flag
        cadence = re.findall(r"^`--cadence`, field `(\w+)`", equivalent)
        assert set(cadence) <= {field.name for field in dataclasses.fields(CadencePolicy)}, flag
    for words in re.findall(r"`--interventions (\S+?)`", text):
        assert make_interventions([words])


def test_the_view_has_a_column_per_stream_and_strikes_what_is_withdrawn(tokenizer):
    screen = console(terminal=True)
    first, second = tokenizer("barley grows")["input_ids"], tokenizer("a river")["input_ids"]
    with LiveView(tokenizer, 1, 2, screen) as view:
        view.put(0, 0, first[:1])
        view.rollback(0, 1, first)
        view.put(0, 0, first[1:])
        view.put(0, 1, second)
        view.end()
    assert view.texts[0, 0].plain == "barley grows"
    assert view.texts[0, 1].plain == "barley growsa river"
    assert [str(span.style) for span in view.texts[0, 1].spans] == ["red strike"]
    shown = screen.file.getvalue()
    assert "stream 0" in shown and "stream 1" in shown and "1 block rewritten" in shown


def test_the_view_shows_blocks_that_wait(model, tokenizer):
    prompt = tokenizer("Velmar.", return_tensors="pt", add_special_tokens=False)["input_ids"]
    waited = []

    class Watched(LiveView):
        def stall(self, prompt, stream, token_ids):
            super().stall(prompt, stream, token_ids)
            panel = self.render().columns[stream]._cells[0]
            waited.append((stream, token_ids, panel.subtitle, [str(span.style) for span in panel.renderable.spans]))

    call = {"max_new_tokens": 8, "commit_policy": "stall", "agreement_threshold": 0.9999, "max_retries": 2}
    with Watched(tokenizer, 1, 3, console(terminal=True)) as view:
        output = model.generate(prompt, streamer=view, return_dict_in_generate=True, **call)
    stalls = output.trace.of_kind("stall")
    assert [entry[:2] for entry in waited] == [(event["stream"], event["tokens"]) for event in stalls] != []
    assert {(note, styles[-1]) for _, _, note, styles in waited} == {("[yellow]waiting[/yellow]", "yellow")}
    assert not view.waiting and [view.tokens[0, s] for s in range(3)] == [row.token_ids for row in output.streams[0]]
    lines = console()
    model.generate(prompt, streamer=LiveView(tokenizer, 1, 3, lines), **call)
    begun = [event for event in stalls if event["attempt"] == 0]
    assert lines.file.getvalue().count(" waits: ") == len(begun)


def test_the_view_shows_what_is_being_written(model, tokenizer):
    prompt = tokenizer("Velmar.", return_tensors="pt", add_special_tokens=False)["input_ids"]
    shown = []

    class Watched(LiveView):
        def draft(self, prompt, stream, token_id):
            super().draft(prompt, stream, token_id)
            shown.append((stream, token_id, self.render().columns[stream]._cells[0].renderable.plain))

    with Watched(tokenizer, 1, 3, console(terminal=True)) as view:
        output = model.generate(prompt, max_new_tokens=6, streamer=view, return_dict_in_generate=True)
    for stream, row in enumerate(output.streams[0]):
        assert [token for place, token, _ in shown if place == stream] == row.token_ids
        written = [text for place, _, text in shown if place == stream]
        assert written[2] == tokenizer.decode(row.token_ids[:3], skip_special_tokens=True)
    assert not any(view.drafts.values())
    assert not LiveView(tokenizer, 1, 3, console()).wants_drafts


def test_the_documents_code_runs(model, tokenizer, monkeypatch):
    text = (ROOT / "docs/decoding.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 9
    monkeypatch.setattr(PDTForParallelDecoding, "from_pretrained", lambda *args: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args: tokenizer)
    exec("\n".join(blocks), {})
