"""generate() as its callers see it: limits, layouts, trace, streamers, processors, criteria, cost."""

import json

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.interventions import Ablate, GateZero, NormScramble, SelfOnly, Stale, Swap, ZeroNotes
from modeling_pdt.streaming import ParallelStreamer

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def model(make_model):
    return make_model("llama", trained=True)


def decode(model, ids=IDS, **kwargs):
    values = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": True, **kwargs}
    return model.generate(ids, return_dict_in_generate=True, **values)


class Always(LogitsProcessor):
    """Forces the token that a table gives for the length of a row's history."""

    def __init__(self, table, default=20):
        self.table, self.default = table, default

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -float("inf"))
        forced[:, self.table.get(input_ids.shape[1], self.default)] = 0
        return forced


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 8, 11])
def test_limits_are_exact(model, limit):
    output = decode(model, max_new_tokens=limit)
    for rows in output.streams:
        for row in rows:
            assert len(row.token_ids) == limit
            assert row.blocks == [(start, min(start + 4, limit)) for start in range(0, limit, 4)]
            assert not row.finished
    assert output.trace.calls == limit


def test_eos_at_once(model):
    output = decode(model, logits_processor=[Always({}, default=1)], eos_token_id=1)
    for rows in output.streams:
        assert [(row.token_ids, row.blocks, row.finished) for row in rows] == [([1], [(0, 1)], True)] * 3
    assert output.sequences.tolist() == [[*IDS[row // 3].tolist(), 1] for row in range(6)]
    assert [merged.tolist() for merged in output.merged] == [[], []]
    assert output.trace.calls == 1


def test_eos_in_mid_block_closes_the_short_block(model):
    output = decode(model, logits_processor=[Always({10: 2})], eos_token_id=[1, 2])
    for rows in output.streams:
        for row in rows:
            assert row.token_ids == [20] * 6 + [2]
            assert row.blocks == [(0, 4), (4, 7)]
            assert row.finished
    assert {event["round"] for event in output.trace.of_kind("commit")} == {0, 1}


def test_rows_end_on_their_own_and_are_padded(model):
    class EosOfStream(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = torch.full_like(scores, -float("inf")).index_fill(1, torch.tensor([20]), 0.0)
            for row, history in enumerate(input_ids):
                if 90 in history and len(history) >= 7:
                    scores[row] = torch.full_like(scores[row], -float("inf"))
                    scores[row, 1] = 0
            return scores

    output = decode(
        model,
        IDS[:1],
        num_streams=2,
        tokenizer=lambda text, add_special_tokens: {"input_ids": [int(word) for word in text.split()]},
        stream_prefixes=["90", "91 92"],
        logits_processor=[EosOfStream()],
        eos_token_id=1,
        max_new_tokens=5,
    )
    assert output.sequences.tolist() == [
        [0, 5, 6, 7, 8, 90, 20, 20, 1, 0, 0],
        [5, 6, 7, 8, 91, 92, 20, 20, 20, 20, 20],
    ]
    assert output.merged[0].tolist() == [90, 20, 20, 91, 92, 20, 20, 20, 20, 20]
    assert [row.finished for row in output.streams[0]] == [True, False]
    assert [len(row.token_ids) for row in output.streams[0]] == [3, 5]


def test_sequences_of_one_prompt_are_adjacent(model):
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    output = decode(model, ids, attention_mask=(ids > 0).long(), max_new_tokens=4)
    assert output.sequences[:3, :3].tolist() == [[0, 5, 6]] * 3
    assert output.sequences[3:, :3].tolist() == [[7, 8, 9]] * 3
    for row, sequence in enumerate(output.sequences):
        assert sequence[3:].tolist() == output.streams[row // 3][row % 3].token_ids
    plain = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=4, do_sample=True, eos_token_id=None)
    assert torch.equal(plain, output.sequences)
    right = torch.tensor([[5, 6, 0], [7, 8, 9]])
    assert torch.equal(decode(model, right, attention_mask=(right > 0).long(), max_new_tokens=4).sequences, plain)


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 6])
def test_streams_are_free_at_run_time(model, streams):
    output = decode(model, num_streams=streams)
    assert [len(rows) for rows in output.streams] == [streams, streams]
    assert output.sequences.shape[0] == 2 * streams
    assert [row.name for row in output.streams[0]] == [f"stream_{k}" for k in range(streams)]
    assert len({tuple(row.token_ids) for row in output.streams[0]}) == streams


def test_the_trace_tells_what_happened(model):
    model.config._adapter_config.trained_parts = ["agreement"]
    output = decode(model, agreement_threshold=0.9, interventions=[Stale(), Ablate()])
    manifest = json.loads(json.dumps(output.trace.to_manifest()))
    assert manifest["schema_version"] == "1.2"
    assert manifest["settings"]["interventions"] == ["stale", "ablate"]
    assert manifest["settings"]["num_streams"] == 3
    assert manifest["calls"] == output.trace.calls
    assert manifest["timings"]["total_s"] >= manifest["timings"]["prefill_s"] > 0
    assert {event["kind"] for event in manifest["events"]} >= {"plan", "commit"}
    assert manifest["events"][0] == {"kind": "plan", "prompt": 0, "items": [], "headers": [[], [], []]}
    for prompt, rows in enumerate(output.streams):
        for stream, row in enumerate(rows):
            mine = [e for e in output.trace.of_kind("commit") if (e["prompt"], e["stream"]) == (prompt, stream)]
            assert [(event["start"], event["end"]) for event in mine] == row.blocks
            assert [event["round"] for event in mine] == list(range(len(row.blocks)))


def test_one_lower_and_one_upper_call_per_token(model, monkeypatch):
    model.config._adapter_config.trained_parts = ["agreement"]
    calls = {"lower": 0, "upper": 0, "project_notes": 0}
    for name in calls:
        original = getattr(model.stack, name)

        def count(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(model.stack, name, count)
    output = decode(model, max_new_tokens=12)
    # Prefill, headers, then a call per token; nobody needs the last token's upper half or reads the last notes.
    assert output.trace.calls == 12
    assert calls == {"lower": 14, "upper": 13, "project_notes": 3}
    calls.update(lower=0, upper=0, project_notes=0)
    output = decode(model, max_new_tokens=12, agreement_threshold=1.0)
    assert calls["lower"] == output.trace.calls + 2
    assert calls["upper"] == output.trace.calls + 1
    # A retry costs its tokens and nothing else: 4 tokens once, 4 again, per block.
    assert output.trace.calls == 3 * (4 + 4)


def test_the_caller_may_merge_an_answer(model):
    seen = []

    def last_first(parts, results):
        seen.append([result.name for result in results])
        return [token for part in reversed(parts) for token in part]

    output, plain = decode(model, max_new_tokens=3, merge=last_first), decode(model, max_new_tokens=3)
    assert seen == [["stream_0", "stream_1", "stream_2"]] * 2
    for merged, expected in zip(output.merged, plain.merged, strict=True):
        assert merged.tolist() == [*expected[6:], *expected[3:6], *expected[:3]]
    assert torch.equal(output.sequences, plain.sequences)
    with pytest.raises(ValueError, match="merge must be a function of parts and results, got 'reverse'"):
        decode(model, merge="reverse")


class Recorder(ParallelStreamer):
    def __init__(self):
        self.puts, self.withdrawn, self.ended = [], [], 0

    def rollback(self, prompt, stream, token_ids):
        self.withdrawn.append((prompt, stream, token_ids))

    def put(self, prompt, stream, token_ids):
        assert not self.ended
        self.puts.append((prompt, stream, token_ids))

    def end(self):
        self.ended += 1


def test_a_streamer_hears_of_committed_blocks_only(model):
    model.config._adapter_config.trained_parts = ["agreement"]
    recorder = Recorder()
    output = decode(model, agreement_threshold=0.999, streamer=recorder)
    assert output.trace.of_kind("rollback")
    assert recorder.ended == 1
    rollbacks = [(event["prompt"], event["stream"], event["tokens"]) for event in output.trace.of_kind("rollback")]
    assert recorder.withdrawn == rollbacks
    for prompt, rows in enumerate(output.streams):
        for stream, row in enumerate(rows):
            blocks = [tokens for p, s, tokens in recorder.puts if (p, s) == (prompt, stream)]
            assert blocks == [row.token_ids[start:end] for start, end in row.blocks]


class Words:
    """The least that TextStreamer needs of a tokenizer."""

    def decode(self, tokens, **kwargs):
        return "".join(f"{token} " for token in tokens)


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_plain_streamer_serves_one_row(model, capsys, skip_prompt):
    output = decode(model, IDS[:1], num_streams=1, streamer=TextStreamer(Words(), skip_prompt=skip_prompt))
    written = [int(word) for word in capsys.readouterr().out.split()]
    section = output.streams[0][0].token_ids
    assert written == section if skip_prompt else [*IDS[0].tolist(), *section]


def test_streamers_that_cannot_serve_are_refused(model):
    with pytest.raises(ValueError, match="streamer: TextStreamer serves one row, this call has 6; use a Parallel"):
        decode(model, streamer=TextStreamer(Words()))
    with pytest.raises(ValueError, match="streamer must be a ParallelStreamer or have its methods"):
        decode(model, streamer=object())
    assert issubclass(TextStreamer, BaseStreamer)


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 15, "repetition_penalty": 0.5},
        {"bad_words_ids": [[20], [30, 31]], "suppress_tokens": list(range(40, 60))},
    ],
)
def test_processors_with_histories_work_as_in_generate(make_trunk, arguments):
    trunk = make_trunk("llama")
    ids = torch.randint(2, 97, (1, 9))
    common = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0, **arguments}
    reference = trunk.generate(ids, attention_mask=torch.ones_like(ids), **common)
    model = PDTForParallelDecoding.from_trunk(trunk, block_size=4).eval()
    assert torch.equal(model.generate(ids, num_streams=1, gate_scale=0.0, **common), reference)


def test_processors_that_count_from_the_prompt_serve_every_length(model):
    ids = torch.tensor([[0, 0, 0, 5, 6], [7, 8, 9, 10, 11]])
    output = decode(
        model,
        ids,
        attention_mask=(ids > 0).long(),
        min_new_tokens=6,
        max_new_tokens=12,
        eos_token_id=list(range(1, 90)),
    )
    for rows in output.streams:
        assert min(len(row.token_ids) for row in rows) == 7
        assert not {token for row in rows for token in row.token_ids[:6]} & set(range(1, 90))


def test_a_processor_sees_prompt_header_and_own_tokens_only(model):
    seen = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.extend(input_ids.tolist())
            return scores

    model.config._adapter_config.trained_parts = ["agreement"]
    output = decode(model, logits_processor=[Watch()], agreement_threshold=0.999)
    finals = {(row // 3, tuple(sequence.tolist())) for row, sequence in enumerate(output.sequences)}
    for history in seen:
        assert history[:4] in IDS.tolist()
    for _, final in finals:
        assert all(list(final[:length]) in seen for length in range(4, 16))


def test_a_criterion_that_fires_ends_its_row(model):
    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            assert input_ids.shape[0] == 1
            return torch.tensor([bool(input_ids[0, 0] == 9 and input_ids.shape[1] >= 4 + 6)])

    output = decode(model, stopping_criteria=[Stop()])
    assert [len(row.token_ids) for row in output.streams[0]] == [12] * 3
    assert [len(row.token_ids) for row in output.streams[1]] == [6] * 3
    assert [row.blocks for row in output.streams[1]] == [[(0, 4), (4, 6)]] * 3
    assert not output.streams[1][0].finished


@pytest.mark.parametrize("kind", [GenerationConfig, None])
def test_a_generation_config_fills_in_what_it_does_not_say(model, kind):
    model.generation_config.eos_token_id = 1
    model.generation_config.max_retries = 3
    given = {"max_new_tokens": 7, "do_sample": False}
    arguments = given if kind is None else {"generation_config": kind(**given)}
    processors = [Always({9: 1})]
    output = model.generate(IDS, return_dict_in_generate=True, logits_processor=processors, **arguments)
    assert [row.token_ids for row in output.streams[0]] == [[20] * 5 + [1]] * 3
    assert output.trace.settings["max_retries"] == 3
    assert model.generation_config.max_new_tokens is None


def test_the_callers_random_state_is_left_alone(model):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    decode(model)
    assert torch.equal(torch.rand(3), expected)


def logits_of(model, **kwargs):
    """Raw logits of greedy decoding, forced along one path: what interventions change, step by step."""
    seen = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores

    decode(model, logits_processor=[Watch(), Always({})], **kwargs)
    return torch.stack(seen)


def test_interventions_change_the_logits_that_they_should(model):
    plain = logits_of(model)
    assert torch.equal(logits_of(model, interventions=[GateZero()]), logits_of(model, gate_scale=0.0))
    off = logits_of(model, interventions=[Ablate()])
    assert torch.allclose(off, logits_of(model, gate_scale=0.0), atol=1e-6)
    for intervention in (Ablate(), ZeroNotes(), GateZero(), Stale(), NormScramble(), SelfOnly()):
        changed = logits_of(model, interventions=[intervention])
        assert torch.allclose(changed[:4], plain[:4], atol=1e-6), intervention.name
        assert (changed[4:] - plain[4:]).abs().max() > 1e-4, intervention.name


def test_swap_reads_the_other_prompts_streams(model):
    """With forced tokens, prompt 0 under swap reads exactly what it reads when its notes are seeded by prompt 1."""
    plain, swapped = logits_of(model), logits_of(model, interventions=[Swap()])
    assert (swapped[4:] - plain[4:]).abs().max() > 1e-4
    assert torch.allclose(logits_of(model, interventions=[Swap([0, 1])]), plain, atol=1e-6)
    assert torch.allclose(logits_of(model, interventions=[Swap(), Swap()]), plain, atol=1e-6)


def test_stale_notes_are_a_longer_lag(model):
    assert torch.allclose(logits_of(model, interventions=[Stale(1)]), logits_of(model, bus_lag=2), atol=1e-6)


def test_coverage_threshold_decides_what_counts_as_covered(model):
    class Words:
        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [2 + len(text) % 50, 3]}

    plan = [{"text": "a" * k, "stream": k % 3} for k in range(1, 5)]
    low, high = (
        model.generate(
            torch.randint(2, 60, (1, 6)),
            tokenizer=Words(),
            plan_texts=plan,
            coverage_threshold=threshold,
            do_sample=False,
            max_new_tokens=8,
            return_dict_in_generate=True,
        )
        for threshold in (0.0, 1.0)
    )
    for stream, (all_items, none) in enumerate(zip(low.streams[0], high.streams[0], strict=True)):
        assert set(all_items.covered) == {k for k in range(4) if plan[k]["stream"] == stream}
        assert none.covered == ()
