"""Cadence, gate scale, logit blend, commit and retry policies: each changes tokens or trace as it says."""

from types import SimpleNamespace

import pytest
import torch

from modeling_pdt import PDTGenerationConfig
from modeling_pdt.cadence import Cadence, interval_tokens
from modeling_pdt.gate import RetryPolicy, best_items
from modeling_pdt.gate_scale import GateScale
from modeling_pdt.interventions import Ablate, Freeze, RandomGate, Shuffle, Stale, Tag
from modeling_pdt.policies import CadencePolicy, FlickerGuard, GateAnnealing, SensitivityProbe
from modeling_pdt.safeguards import SensitivityMeter
from tests.decoding_shadow import Shadow, decoder_for

TOLERANCE = 1e-5
HEADERS = [[11, 12, 13], [14], [15, 16, 17, 18, 19]]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


@pytest.fixture
def model(make_model):
    """A tiny PDT model on Llama whose parameters have moved and whose agreement head counts as trained."""
    model = make_model("llama", trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    return model


@torch.no_grad()
def decode(model, prompts=PROMPTS, **kwargs):
    return decoder_for(model, prompts, **{"max_new_tokens": 18, **kwargs}).run()


def lengths(output):
    """Lengths of the blocks `[row][block]`."""
    return [[end - start for start, end in row.blocks] for rows in output.streams for row in rows]


def texts(output):
    return [row.token_ids for rows in output.streams for row in rows]


def test_shares_become_tokens():
    policy = CadencePolicy(interval_min=8, interval_max=128)
    assert [interval_tokens(rho, policy, 4) for rho in (1.0, 0.75, 0.5, 0.0)] == [8, 16, 32, 128]
    assert interval_tokens(0.9, policy, 4) == 11
    assert [interval_tokens(value, policy, 4) for value in (None, 7)] == [4, 7]


def test_every_stream_has_its_own_interval(model):
    output = decode(model, commit_horizon=9, cadence={"interval": [3, 9, 5]})
    assert lengths(output) == [[3] * 6, [9, 9], [5, 5, 5, 3]] * 2
    assert output.trace.settings["block_tokens"] == [3, 9, 5]
    assert lengths(decode(model, cadence={"interval": 4, "max_interval": 2}))[0] == [2] * 9
    assert texts(decode(model, cadence={"interval": 4})) == texts(decode(model))
    assert texts(output) != texts(decode(model))


def test_blocks_of_chance_depend_on_nothing_but_the_row(model):
    choices = {"commit_horizon": 8, "cadence": {"mode": "stochastic", "interval": 3}, "max_new_tokens": 40}
    output = decode(model, **choices)
    blocks = [block for row in lengths(output) for block in row]
    assert len(set(blocks)) > 4 and max(blocks) == 8
    assert 2 < sum(blocks) / len(blocks) < 4
    for event in output.trace.of_kind("commit"):
        assert event["cadence"]["probability"] == pytest.approx(1 / 3)
        last = event["end"] == 40
        assert event["cadence"]["drawn"] or event["end"] - event["start"] == 8 or last
    alone = decode(model, PROMPTS[1:], **choices)
    assert lengths(alone) == lengths(output)[3:] and texts(alone) == texts(output)[3:]
    assert lengths(decode(model, **choices, seed=1)) != lengths(output)


def make_cadence(**choices):
    stream_R = torch.zeros(4, dtype=torch.long)
    return Cadence(CadencePolicy("adaptive", 10, **choices), 4, 64, stream_R, torch.arange(4))


def test_adaptive_probability_follows_agreement_and_age():
    zeros, cadence = torch.zeros(4, dtype=torch.long), make_cadence()
    cadence.judged(torch.arange(3), torch.tensor([0.1, 0.425, 0.9]))
    cadence.complete(zeros, zeros, zeros)
    assert cadence.probability_R.tolist() == pytest.approx([0.2, 0.125, 0.05, 0.05])
    cadence = make_cadence(age_boost=1.0)
    cadence.complete(torch.tensor([5, 10, 20, 60]), zeros, zeros)
    assert cadence.probability_R.tolist() == pytest.approx([0.05, 0.05, 0.1, 0.2])


def test_a_stream_that_disagrees_ends_its_blocks_earlier(model):
    class Agreement(RandomGate):
        def agreement(self, agreement_M, rows_M, round_M, attempt_M):
            return torch.full_like(agreement_M, self.rate)

    choices = {"commit_horizon": 32, "cadence": {"mode": "adaptive", "interval": 6}, "max_new_tokens": 36}
    low, high = (lengths(decode(model, **choices, interventions=[Agreement(rate)])) for rate in (0.0, 1.0))
    assert sum(map(len, low)) > 2 * sum(map(len, high))


def test_impossible_cadences_are_refused(model, make_model):
    for cadence, message in (
        ({"mode": "random"}, "mode must be one of"),
        ({"interval": [3, 3]}, r"one value per stream \(3\)"),
        ({"interval": 99}, "at most commit_horizon=4 tokens long, got 99"),
        ({"interval": 1.5}, r"interval must be in \[0, 1\]"),
        ({"rate": 3}, "cadence must be a mapping of"),
        ({"agreement_low": 0.7}, r"agreement_high must be in \(agreement_low, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(model, cadence=cadence)
    with pytest.raises(ValueError, match="follows the agreement head, which is not trained"):
        decode(make_model("llama"), cadence={"mode": "adaptive"})


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_rows_of_any_block_length_continue_as_fresh_ones(make_model, name):
    model = make_model(name, trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    cadence = {"mode": "stochastic", "interval": 4}
    choices = {"commit_horizon": 9, "cadence": cadence, "agreement_threshold": 0.5, "max_retries": 2}
    shadow = Shadow(
        decoder_for(model, PROMPTS, HEADERS, max_new_tokens=30, **choices, interventions=[RandomGate(0.3)])
    )
    with torch.no_grad():
        shadow.run()
    assert max(count for _, count in shadow.events) > 4
    assert max(shadow.largest_difference(row) for row in range(6)) < TOLERANCE


def test_an_annealed_gate_decays_waits_and_recovers():
    rows, one = torch.tensor([0]), torch.zeros(1, dtype=torch.bool)
    gate = GateScale(1.0, 2, torch.device("cpu"), GateAnnealing(0.5, 0.3, 1, 0.25, 0.1), threshold=0.5)
    seen = []
    for agreement in (0.4, 0.59, 0.61, 0.9, 0.9, 0.9, 0.9):
        gate.judged(rows, torch.tensor([agreement]), one)
        seen.append(round(float(gate.of(torch.tensor([0, 1]))[0]), 4))
    assert seen == [0.5, 0.3, 0.3, 0.55, 0.8, 1.0, 1.0]
    assert gate.of(torch.tensor([1])).item() == 1
    gate.judged(rows, torch.tensor([0.9]), ~one)
    assert gate.of(rows).item() == 0.5


def test_the_annealed_scale_is_what_multiplies_the_gate(model):
    choices = {"agreement_threshold": 1.0, "max_retries": 0}
    plain = decode(model, **choices)
    silent = decode(model, **choices, gate_annealing={"decay": 0.0, "min_value": 0.0})
    fixed = decode(model, **choices, gate_annealing={"decay": 1.0})
    assert texts(fixed) == texts(plain) != texts(silent)
    scales = [event["gate_scale"] for event in silent.trace.of_kind("commit")]
    assert scales == [0.0] * len(scales)
    # Nothing is there to be read in the first block, written with the full gate; the others have none.
    assert texts(silent) == texts(decode(model, **choices, gate_scale=0.0))


def test_every_row_reads_with_the_scale_that_it_has(make_model):
    model = make_model("gpt_oss", trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    choices = {"agreement_threshold": 0.5, "gate_annealing": {"decay": 0.5}, "max_new_tokens": 12}
    decoder = decoder_for(model, PROMPTS, interventions=[RandomGate(0.4, seed=1)], **choices)
    seen, project = [], decoder.stack.project_notes

    def spy(notes, mask, scale):
        seen.append(scale)
        return project(notes, mask, scale)

    decoder.stack.project_notes = spy
    try:
        with torch.no_grad():
            output = decoder.run()
    finally:
        del decoder.stack.project_notes
    assert len({tuple(scale.tolist()) for scale in seen}) > 2
    events = [event for event in output.trace.events if event["kind"] != "plan"]
    assert {event["gate_scale"] for event in events if event["kind"] == "rollback"} <= {0.5, 0.25, 0.275}


def test_a_gate_that_flickers_is_told_and_clamped():
    def run(clamp):
        guard = FlickerGuard(window=3, max_std=0.2, clamp=clamp)
        annealing = GateAnnealing(decay=0.2, min_value=0.1, cooldown=0, recovery=1.0)
        gate = GateScale(1.0, 1, torch.device("cpu"), annealing, guard, 0.5)
        seen, rows = [], torch.tensor([0])
        for agreement in (0.9, 0.1, 0.9, 0.9, 0.9):
            gate.judged(rows, torch.tensor([agreement]), torch.tensor([False]))
            seen.append((gate.record(rows)[0]["flickers"], round(float(gate.of(rows)), 4)))
        return seen

    assert run(None) == [(False, 1.0), (False, 0.2), (True, 1.0), (True, 1.0), (False, 1.0)]
    assert run(0.3) == [(False, 1.0), (False, 0.2), (True, 0.3), (True, 0.3), (False, 1.0)]


def test_a_row_whose_best_item_keeps_changing_is_told_and_clamped():
    gate = GateScale(1.0, 2, torch.device("cpu"), None, FlickerGuard(window=4, max_switches=1, clamp=0.3))
    seen, row = [], torch.tensor([1])
    for item in (2, 0, 2, 2, 2, 0):
        gate.judged(row, None, torch.tensor([False]), torch.tensor([item]))
        seen.append((*gate.record(row)[0].values(), round(float(gate.of(row)), 4)))
    # Nothing is said before the fourth block.
    told = [(False, 0), (False, 1), (False, 2), (True, 2), (False, 1), (False, 1)]
    assert seen == [(flag, count, 0.3 if flag else 1.0) for flag, count in told]
    assert gate.record(torch.tensor([0])) == [{"flickers": False, "switches": 0}]
    assert best_items(torch.tensor([[0.9, 0.2, 0.5]]), torch.tensor([[False, True, True]])).tolist() == [2]


def test_annealing_needs_a_gate_and_a_guard_needs_annealing(model):
    for choices, message in (
        ({"gate_annealing": {}}, "needs a trained head and agreement_threshold"),
        ({"flicker_guard": {}}, "it needs gate_annealing or max_switches"),
        ({"flicker_guard": {"max_switches": 1}}, "it needs a plan"),
        ({"flicker_guard": {"max_switches": 7}}, r"max_switches must be in \[0, 6\], got 7"),
        (
            {"gate_annealing": {"min_value": 2.0}, "agreement_threshold": 0.5},
            r"min_value must be in \[0, gate_scale=1.0\]",
        ),
        ({"gate_annealing": {"decay": 2.0}}, r"decay must be in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(model, **choices)


class Blended:
    """A model whose logits are `share` of its own and else the bare trunk's."""

    def __init__(self, model, share):
        self.model, self.share, self.project_notes = model, share, model.project_notes

    def __call__(self, ids, **conditioning):
        own, bare = self.model(ids, **conditioning).logits, self.model(ids).logits
        return SimpleNamespace(logits=self.share * own + (1 - self.share) * bare)


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_blended_logits_are_those_of_two_models(make_model, name):
    model = make_model(name, trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    choices = {"agreement_threshold": 0.5, "eos_token_id": 3, "do_sample": True, "max_new_tokens": 22}
    decoder = decoder_for(model, PROMPTS, HEADERS, logit_blend=0.25, interventions=[RandomGate(0.3)], **choices)
    shadow = Shadow(decoder)
    with torch.no_grad():
        shadow.run()
        assert shadow.events
        assert max(shadow.largest_difference(row) for row in range(6)) > 100 * TOLERANCE
        decoder.model = Blended(model, 0.25)
        assert max(shadow.largest_difference(row) for row in range(6)) < TOLERANCE


def test_a_blend_of_zero_is_the_trunk(model):
    output = decode(model, PROMPTS[:1], logit_blend=0.0, num_streams=2)
    ids = torch.tensor(PROMPTS[:1])
    with model.disable_adapter(), torch.no_grad():
        trunk = model.trunk.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=18,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert texts(output) == [trunk[0, 4:].tolist()] * 2
    assert texts(decode(model, logit_blend=1.0)) == texts(decode(model)) != texts(decode(model, logit_blend=0.3))


def test_a_round_stands_or_falls_with_its_lowest_agreement(model):
    only_one = {(0, 1): 0.2, (0, 2): 0.4}

    class Chosen(RandomGate):
        def agreement(self, agreement_M, rows_M, round_M, attempt_M):
            low = [
                only_one.get((int(v), int(r)), 0.9) if int(a) == 0 else 0.9
                for r, v, a in zip(rows_M, round_M, attempt_M, strict=True)
            ]
            return torch.tensor(low)

    for policy, expected in (("stream", [1, 1]), ("round", [0, 1, 2])):
        output = decode(model, agreement_threshold=0.5, commit_policy=policy, interventions=[Chosen()])
        rolled = [(event["prompt"], event["stream"]) for event in output.trace.of_kind("rollback")]
        if policy == "round":
            assert rolled == [(0, stream) for stream in expected]
        else:
            assert sorted(rolled) == [(0, 1), (0, 2)]


def test_retries_cool_by_the_factor_asked_for(model):
    logits = torch.tensor([[1.0, 2.0]] * 4)
    tempered = RetryPolicy(3, "refresh", 0.25).temper(logits, torch.tensor([0, 1, 2, 3]))
    assert tempered[:, 0].tolist() == [1, 1, 4, 16]
    choices = {"agreement_threshold": 1.0, "max_retries": 3, "do_sample": True, "max_new_tokens": 12}
    assert texts(decode(model, **choices)) == texts(decode(model, **choices, retry_temperature=0.5))
    assert texts(decode(model, **choices)) != texts(decode(model, **choices, retry_temperature=4.0))


@pytest.mark.parametrize("streams", [1, 2, 5, 8])
def test_any_number_of_streams_says_which_adapter_each_has(model, streams):
    output = decode(model, num_streams=streams, max_new_tokens=6)
    assert [len(rows) for rows in output.streams] == [streams] * 2
    assert output.trace.settings["stream_adapters"] == [0, 1, 2, 0, 1, 2, 0, 1][:streams]


def test_interventions_reach_single_streams_and_the_trace(model):
    plain, alone = texts(decode(model)), texts(decode(model, interventions=[Ablate()]))
    output = decode(model, interventions=[Ablate().on(0), Tag("first")])
    assert plain[0] != alone[0] == texts(output)[0]
    assert output.trace.settings["intervention_options"] == [
        {"name": "ablate", "arguments": {"plan": False}, "streams": (0,)},
        {"name": "tag", "arguments": {"label": "first"}, "streams": None},
    ]
    for kind in (Freeze(1), Shuffle(), Stale(2)):
        assert texts(decode(model, interventions=[kind])) != plain


@pytest.mark.parametrize("blend", [1.0, 0.5])
def test_the_probe_measures_what_disturbed_notes_do(make_model, blend):
    model = make_model("gpt_oss", trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    choices = {"agreement_threshold": 0.5, "max_new_tokens": 24, "logit_blend": blend}
    gate = [RandomGate(0.3)]
    plain = decode(model, **choices, interventions=gate)
    probe = {"every": 2, "epsilon": 1e-3, "max_ratio": 1e-4}
    output = decode(model, **choices, interventions=gate, sensitivity_probe=probe)
    # Measuring leaves the cache, and so every token, as it was.
    assert texts(output) == texts(plain) and output.trace.of_kind("rollback")
    events = output.trace.of_kind("sensitivity")
    assert len(events) > 2 and not plain.trace.of_kind("sensitivity")
    ratios = [row["ratio"] for event in events for row in event["rows"]]
    assert all(0 < ratio < 10 for ratio in ratios)
    assert all(event["excessive"] and event["largest"] in [row["ratio"] for row in event["rows"]] for event in events)
    silent = decode(model, **choices, gate_scale=0.0, sensitivity_probe=probe)
    still = [row["ratio"] for event in silent.trace.of_kind("sensitivity") for row in event["rows"]]
    assert still and not any(still)


def test_the_measured_ratio_is_the_change_of_logits_by_the_noise_that_was_added():
    meter = SensitivityMeter(SensitivityProbe(epsilon=0.5), 0)
    notes, mask = torch.ones(1, 4, 4), torch.tensor([[True, True, False, True]])
    noise = meter.disturb(notes, mask) - notes
    assert not noise[0, 2].any()
    assert noise.norm().item() == pytest.approx(0.5 * 12**0.5)
    assert meter.ratios(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]])).item() == pytest.approx(0.4)


def test_groups_of_options_are_saved_with_the_model(tmp_path):
    config = PDTGenerationConfig(
        cadence={"mode": "stochastic", "interval": [3, 0.5]}, topology=[(0, 1)], logit_blend=0.5
    )
    config.save_pretrained(tmp_path)
    again = PDTGenerationConfig.from_pretrained(tmp_path)
    assert again.cadence == config.cadence and again.logit_blend == 0.5
    assert again.topology == [[0, 1]] and again.gate_annealing is None
    with pytest.raises(ValueError, match=r"cadence must be a mapping of \['mode', .*\], got 'stochastic'"):
        PDTGenerationConfig(cadence="stochastic")
