"""Ways of answering side by side: costs, counted facts, and the recipe that writes both."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from modeling_pdt.outputs import StreamResult
from modeling_pdt.trace import DecodingTrace
from recipes import baselines
from tests.tiny_baselines import make_request, tiny_model, tokenizer, whole_model
from trainer_pdt.baselines import METHODS, Request, Run
from trainer_pdt.baselines.arguments import BaselineArguments
from trainer_pdt.baselines.comparison import comparison_table, count_answers, measure_costs, outlined_document
from trainer_pdt.data.worlds import WorldOptions, generate_document
from trainer_pdt.decode_runs import read_run
from trainer_pdt.telemetry import read_json


def make_run(texts, seconds=1.0, block=8, **baseline):
    """A run whose sections say `texts`."""
    results = []
    for number, text in enumerate(texts):
        ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
        blocks = [(start, min(start + block, len(ids))) for start in range(0, len(ids), block)]
        results.append(StreamResult(f"stream_{number}", ids, blocks, {}, (), 0, True))
    trace = DecodingTrace(settings={"baseline": baseline} if baseline else {})
    output = SimpleNamespace(streams=[results], trace=trace)
    return Run(output, make_request(), seconds, calls=10, positions=20)


def test_costs_are_sums_and_ratios_per_written_token():
    slow = [make_run(["a b c"] * 2, seconds) for seconds in (2.0, 4.0, 8.0)]
    fast = [make_run(["a b c"], seconds) for seconds in (0.25, 1.0, 4.0)]
    costs = measure_costs("pdt", fast, slow)
    assert costs["written"] * 2 == measure_costs("pdt", slow, slow)["written"]
    assert (costs["calls"], costs["positions"], costs["seconds"]) == (30, 60, 1.0)
    # Half the tokens in an eighth, a quarter and a half of the time.
    assert (costs["speedup"]["mean"], costs["speedup"]["n"]) == (pytest.approx(2.0), 3)
    assert "same" not in costs
    assert measure_costs("lookahead", [*fast[:2], *slow[2:]], slow)["same"] == 1


def test_rounds_decide_what_counts_as_visible():
    """A fact repeated in the first block is late to a section written at the same time, not to a later one."""
    document = generate_document("test", 0, WorldOptions(), with_notes=False)
    reader, span = next(
        (s, p) for s in document.streams for p in s.spans if p.kind == "sibling" and p.owner < s.stream_id
    )
    texts = ["" for _ in document.streams]
    texts[span.owner] = f"Long before anything else happens here the {span.cue} {span.value}."
    texts[reader.stream_id] = f"{span.cue} {span.value}."
    apart, after = (
        count_answers(name, [make_run(texts)], [document], tokenizer(), tiny_model())
        for name in ("independent", "sequential")
    )
    assert (apart["recall"]["n"], after["recall"]["n"], after["recall"]["mean"]) == (0, 1, 1.0)
    assert apart["references"] == after["references"] == 1
    routed = make_run(texts, name="skeleton", points=False)
    routed.request = Request.from_document(document, tokenizer())
    assert count_answers("skeleton", [routed], [document], tokenizer(), tiny_model())["recall"]["n"] == 1


def test_an_outline_is_the_plan_that_is_counted():
    document = generate_document("test", 0, WorldOptions(), with_notes=False)
    request = Request.from_document(document, tokenizer())
    own = outlined_document(document, request)
    assert [item.item_id for item in own.items] == [item.item_id for item in document.items]
    lines = (replace(request.lines[0], items=("nobody knows this", *request.lines[0].items)), *request.lines[1:])
    assert outlined_document(document, replace(request, lines=lines)).items == own.items


def test_the_table_has_a_row_per_method_and_no_empty_column():
    row = {"written": 3, "calls": 2, "positions": 4, "seconds": 0.5}
    table = comparison_table({"sequential": row, "independent": row})
    assert [cells[0] for cells in table.rows] == [METHODS[name].label for name in ("sequential", "independent")]
    assert table.columns == ("decoding", "tokens written", "trunk calls", "tokens computed", "seconds per answer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["pdt"]}, "allowed: different ones, sequential among them"),
        ({"methods": ["sequential", "medusae"]}, "methods"),
        ({"documents": 0}, "documents=0"),
        ({"lookahead_ngram": 1}, "ngram=1"),
        ({"assistant_model": "small"}, "assistant_model='small', allowed: a model with method 'assistant', else none"),
        ({"methods": ["sequential", "assistant"]}, "assistant_model=None, allowed"),
        ({"prompt": "a", "prompt_file": "b"}, "at most one of `prompt` and `prompt_file`"),
    ],
)
def test_impossible_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BaselineArguments(model="unused", **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder, include_trunk=True)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_recipe_writes_table_and_manifests(folder, tmp_path):
    words = ["--model", folder, "--documents", "2", "--max_new_tokens", "4", "--temperature", "0"]
    report = baselines.main([*words, "--methods", "pdt", "sequential", "--output_folder", str(tmp_path)])
    assert read_json(tmp_path / "baselines.json") == report
    assert report["methods"]["sequential"]["speedup"]["mean"] == 1.0
    assert report["methods"]["pdt"]["written"] == report["methods"]["sequential"]["written"] == 2 * 3 * 4
    assert "sequential" in (tmp_path / "baselines.md").read_text()
    for name in ("pdt", "sequential"):
        runs = [read_run(path) for path in sorted((tmp_path / "manifests" / name).iterdir())]
        assert [sum(run.committed.values()) for run in runs] == [12, 12]


@pytest.mark.slow
def test_a_prompt_of_ones_own_gets_the_trunk_s_outline(tmp_path):
    whole_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--prompt", "Describe the town of Velmar in three parts."]
    words += ["--max_new_tokens", "2", "--methods", "sequential", "--output_folder", str(tmp_path)]
    report = baselines.main(words)
    assert report["settings"]["requests"] == 1
    assert "recall" not in report["methods"]["sequential"]
    prompt = read_json(tmp_path / "manifests/sequential/0000.json")["prompts"][0]
    assert prompt.startswith("Describe the town of Velmar in three parts.\n1. ")
