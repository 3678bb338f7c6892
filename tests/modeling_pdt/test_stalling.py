"""`commit_policy="stall"`: a block that disagrees waits for what its siblings write next."""

import itertools

import pytest
import torch

from modeling_pdt.interventions import Intervention
from tests.decoding_shadow import Shadow, decoder_for

TOLERANCE = 1e-5
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
HEADERS = [[11, 12, 13], [14], []]
# Every block disagrees at every attempt.
ALWAYS = dict.fromkeys(itertools.product(range(3), range(4), range(4)), 0.1)


class Scripted(Intervention):
    """Agreement by (row, round, attempt); 0.9 where nothing is said."""

    name = "scripted"

    def __init__(self, low):
        self.low = low

    def agreement(self, agreement_M, rows_M, round_M, attempt_M):
        places = zip(rows_M.tolist(), round_M.tolist(), attempt_M.tolist(), strict=True)
        return torch.tensor([self.low.get(place, 0.9) for place in places])


@pytest.fixture
def model(make_model):
    """A tiny PDT model on GPT-OSS whose parameters have moved and whose agreement head counts as trained."""
    model = make_model("gpt_oss", trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    return model


def scripted(model, low, headers=HEADERS, **kwargs):
    choices = {"max_new_tokens": 16, "agreement_threshold": 0.5, "max_retries": 3, "commit_policy": "stall", **kwargs}
    return decoder_for(model, PROMPTS, headers, interventions=[Scripted(low)], **choices)


@torch.no_grad()
def decode(model, low, **kwargs):
    return scripted(model, low, **kwargs).run()


def calls(output, kind, stream):
    return [event["call"] for event in output.trace.of_kind(kind) if event["stream"] == stream]


def test_a_block_waits_for_notes_and_is_not_written_again(model):
    plain = decode(model, {})
    output = decode(model, {(1, 0, 0): 0.1, (1, 0, 1): 0.1})
    # Blocks of 4 tokens: the siblings publish in calls 4, 8, 12 and 16, and only then is it judged again.
    assert calls(output, "stall", 1) == [4, 8]
    assert calls(output, "commit", 1) == [12, 16, 20, 24]
    assert calls(output, "commit", 0) == calls(output, "commit", 2) == [4, 8, 12, 16]
    assert not output.trace.of_kind("rollback")
    events = [event for event in output.trace.events if event.get("stream") == 1][:3]
    assert [event["attempt"] for event in events] == [0, 1, 2]
    assert len({tuple(event["tokens"]) for event in events}) == 1
    assert not events[2]["forced"]
    written, before = ([row.token_ids for row in out.streams[0]] for out in (output, plain))
    assert written[1][:4] == before[1][:4]
    # Until then nobody reads its note; the stream itself goes on with newer ones.
    assert all(len(row) == 16 for row in written) and written != before
    assert all(row.retries == 0 for row in output.streams[0])


def test_a_block_that_waits_is_judged_by_what_came_since(model):
    decoder = scripted(model, {(1, 0, 0): 0.1, (1, 0, 1): 0.1})
    seen, request = [], decoder._request

    def on_request(rows, read_round, lag):
        seen.extend(zip(rows.tolist(), read_round.tolist(), lag.tolist(), strict=True))
        return request(rows, read_round, lag)

    decoder._request = on_request
    with torch.no_grad():
        decoder.run()
    own = list(dict.fromkeys((version, lag) for row, version, lag in seen if row == 1 and lag < 1))
    assert own[:3] == [(0, 0), (0, -1), (0, -2)]
    assert all(lag >= 0 for row, _, lag in seen if row != 1)


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_gate_that_everything_fails_ends_within_the_budget(model, retries):
    output = decode(model, ALWAYS, agreement_threshold=0.999, max_retries=retries)
    assert [row.blocks for row in output.streams[0]] == [[(0, 4), (4, 8), (8, 12), (12, 16)]] * 3
    assert all(event["forced"] and event["attempt"] <= retries for event in output.trace.of_kind("commit"))
    stalls = output.trace.of_kind("stall")
    assert bool(stalls) == (retries > 0)
    assert len(stalls) <= 3 * 4 * retries
    # In no call all streams wait.
    for call in {event["call"] for event in stalls}:
        assert len([event for event in stalls if event["call"] == call]) < 3


def test_a_stream_that_reads_nobody_who_writes_does_not_wait(model):
    trace = decode(model, ALWAYS, headers=[[11]], num_streams=1, max_new_tokens=8).trace
    assert trace.calls == 8 and not trace.of_kind("stall")
    chain = decode(model, ALWAYS, topology=[(0, 1), (1, 2)])
    assert not calls(chain, "stall", 0) and calls(chain, "stall", 1)
    assert calls(chain, "commit", 0) == [4, 8, 12, 16]


def test_waiting_rows_continue_as_fresh_ones(model):
    low = {(0, 0, 0): 0.1, (2, 0, 0): 0.2, (2, 0, 1): 0.2, (1, 2, 0): 0.1, (0, 3, 0): 0.1}
    shadow = Shadow(scripted(model, low, max_new_tokens=18))
    with torch.no_grad():
        trace = shadow.run().trace
        assert max(shadow.largest_difference(row) for row in range(3)) < TOLERANCE
    assert len(trace.of_kind("stall")) == 5
