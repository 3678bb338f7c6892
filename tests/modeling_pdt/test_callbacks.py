"""Callbacks of a decoding call: what they are told, in which order, and that listening changes nothing."""

import io
import json

import pytest
import torch

from modeling_pdt.callbacks import EVENTS, JsonLinesWriter, ParallelDecodingCallback, TokenRecorder
from modeling_pdt.interventions import Ablate
from modeling_pdt.streaming import ParallelStreamer

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def model(make_model):
    model = make_model("llama", trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    return model


def decode(model, **options):
    options = {"max_new_tokens": 10, "do_sample": True, "agreement_threshold": 0.999, **options}
    return model.generate(IDS, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, **options)


class Listener(ParallelDecodingCallback):
    def __init__(self):
        self.heard = []

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)
        return lambda decoder, *values: self.heard.append((name, decoder.trace.calls, *values))

    def of(self, name):
        return [values for event, *values in self.heard if event == name]


def test_every_event_is_told_in_order(model):
    listener = Listener()
    output = decode(model, callbacks=[listener], max_retries=2)
    names = [event for event, *_ in listener.heard]
    assert names[:3] == ["on_plan", "on_round_begin", "on_token"] and names[-1] == "on_end"
    assert names.count("on_plan") == names.count("on_end") == 1
    assert [event for _, event in listener.of("on_commit")] == output.trace.of_kind("commit")
    assert [event for _, event in listener.of("on_rollback")] == output.trace.of_kind("rollback") != []
    written = [row for _, rows, rounds, notes in listener.of("on_note") for row in rows.tolist()]
    assert len(written) == len(output.trace.of_kind("commit")) + len(output.trace.of_kind("rollback"))
    begun = sum(len(rows) for _, rows in listener.of("on_round_begin"))
    assert begun == len(written)
    assert names.index("on_note") < names.index("on_rollback") < names.index("on_commit")
    notes = listener.of("on_note")[0][3]
    assert notes.shape == (6, model.config.notes_per_block, model.config.notes_dim)


def test_tokens_told_are_tokens_written(model):
    listener, silent = Listener(), decode(model)
    output = decode(model, callbacks=[listener, TokenRecorder()])
    assert torch.equal(output.sequences, silent.sequences)
    assert silent.trace.tokens == [] and "tokens" not in silent.trace.to_manifest()
    written = {}
    for record in output.trace.tokens:
        written[record["prompt"], record["stream"], record["index"]] = record["token_id"]
    for prompt, rows in enumerate(output.streams):
        for stream, row in enumerate(rows):
            assert [written[prompt, stream, index] for index in range(10)] == row.token_ids
    told = sum(len(tokens) for _, _, tokens, _ in listener.of("on_token"))
    committed = sum(len(event["tokens"]) for event in output.trace.of_kind("commit"))
    withdrawn = sum(len(event["tokens"]) for event in output.trace.of_kind("rollback"))
    assert told == len(output.trace.tokens) == committed + withdrawn == 6 * 10 + withdrawn
    times = [record["time_s"] for record in output.trace.tokens]
    assert times == sorted(times) and times[0] > 0
    *_, scores = listener.of("on_token")[0]
    best = scores[0].topk(2).values
    assert output.trace.tokens[0]["margin"] == pytest.approx(float(best[0] - best[1]))


def test_a_single_choice_has_no_margin(model):
    recorder = TokenRecorder()
    assert {record["margin"] for record in decode(model, callbacks=[recorder], top_k=1).trace.tokens} == {None}


def test_json_lines_follow_the_call(model):
    file = io.StringIO()
    output = decode(model, callbacks=[JsonLinesWriter(file, decode=lambda tokens: f"<{tokens}>")])
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    kinds = [line.pop("event") for line in lines]
    assert kinds[:3] == ["plan", "plan", "token"] and kinds[-1] == "end"
    commits = [line for kind, line in zip(kinds, lines, strict=True) if kind == "commit"]
    assert [line["tokens"] for line in commits] == [event["tokens"] for event in output.trace.of_kind("commit")]
    assert commits[0]["text"] == f"<{commits[0]['tokens']}>"
    assert kinds.count("rollback") == len(output.trace.of_kind("rollback")) > 0
    assert kinds.count("note") == kinds.count("rollback") + kinds.count("commit")
    first = lines[kinds.index("note")]
    assert len(first["rms"]) == model.config.notes_per_block and all(value > 0 for value in first["rms"])
    assert output.trace.tokens == []


def test_the_trace_names_the_layers_that_the_trunk_runs(model):
    assert decode(model).trace.model["instrumented_layers"] == model.config.instrumented_layers == [1, 2]
    with model.disable_adapter():
        described = decode(model, agreement_threshold=None).trace.model
    assert described["instrumented_layers"] == [] and described["adapter"] is None


class Interrupt(ParallelDecodingCallback, ParallelStreamer):
    """Interrupts a call when the method of this name is called for the second time; a streamer too."""

    wants_drafts = True

    def __init__(self, name):
        self.calls = 0
        setattr(self, name, self.interrupt)

    def interrupt(self, *values):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt


def decisions(output):
    return [{**event, "time_s": 0} for event in output.trace.events]


def test_an_interrupted_call_leaves_the_model_usable(model):
    expected, state = decode(model), torch.get_rng_state()
    inside = ("on_round_begin", "on_token", "on_note", "on_commit", "on_rollback")
    interrupted = [{"callbacks": [Interrupt(name)]} for name in inside]
    for choices in (*interrupted, *({"streamer": Interrupt(name)} for name in ("draft", "put", "rollback"))):
        with pytest.raises(KeyboardInterrupt):
            decode(model, **choices)
        assert torch.equal(torch.get_rng_state(), state)
    again = decode(model)
    assert torch.equal(again.sequences, expected.sequences) and decisions(again) == decisions(expected)
    assert not torch.equal(decode(model, interventions=[Ablate()]).sequences, expected.sequences)


@pytest.mark.parametrize("wrong", [object(), TokenRecorder, "recorder"])
def test_other_objects_are_refused(model, wrong):
    with pytest.raises(ValueError, match="callbacks must hold ParallelDecodingCallback objects, got"):
        decode(model, callbacks=[wrong])
