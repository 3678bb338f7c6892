"""What streams may read while they write, judge and rewrite; bounded retries; randomness under rollback."""

import logging

import pytest
import torch

from modeling_pdt.gate import judge, lowest_failing
from modeling_pdt.generation_inputs import merge_generation_config, prepare_inputs
from modeling_pdt.generation_pdt import ParallelDecoder
from modeling_pdt.interventions import RandomGate
from modeling_pdt.sampling import keyed_uniform


@pytest.fixture
def judged(make_model):
    """A model whose agreement head counts as trained."""
    model = make_model("llama", trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    return model


def decoder_for(model, prompts=2, seed=0, **kwargs):
    values = {"eos_token_id": None, "pad_token_id": 0, "do_sample": True, "max_new_tokens": 22, **kwargs}
    config = merge_generation_config(model, None, values)
    ids = torch.arange(prompts * 5).view(prompts, 5) % 90 + 2
    return ParallelDecoder(model, *prepare_inputs(model, config, ids, seed=seed))


class WindowSpy:
    """Checks every window that a decoder's bus hands out against a ledger of what is published."""

    def __init__(self, decoder):
        self.decoder, self.bus = decoder, decoder.bus
        self.standing, self.withdrawn = {}, []
        self.refreshing, self.windows = False, []
        self.publish, self.withdraw, self.window = self.bus.publish, self.bus.withdraw, self.bus.window
        self.bus.publish, self.bus.withdraw, self.bus.window = self._publish, self._withdraw, self._window
        self.refresh = decoder._refresh_window
        decoder._refresh_window = self._refresh

    def _refresh(self):
        self.refreshing = True
        self.refresh()
        self.refreshing = False

    def _publish(self, rows, rounds, notes):
        for row, version, note in zip(rows.tolist(), rounds.tolist(), notes, strict=True):
            self.standing[row, version] = note.clone()
        self.publish(rows, rounds, notes)

    def _withdraw(self, rows, rounds):
        for row, version in zip(rows.tolist(), rounds.tolist(), strict=True):
            self.withdrawn.append(self.standing.pop((row, version)))
        self.withdraw(rows, rounds)

    def _window(self, rows, read_round, lag, sources=None, own_notes=False):
        notes, mask = self.window(rows, read_round, lag, sources, own_notes)
        streams, settings = self.decoder.streams, self.decoder.settings
        for index, row in enumerate(rows.tolist()):
            if self.refreshing:
                rewriting = int(streams.attempt_R[row]) > 0 and settings.retry_policy == "refresh"
                assert int(lag[index]) == (0 if rewriting else settings.bus_lag)
            else:
                assert int(lag[index]) == 0
            newest = int(read_round[index] - lag[index])
            expected = [
                note
                for (producer, version), note in self.standing.items()
                if producer // settings.num_streams == row // settings.num_streams
                and producer != row
                and newest - settings.bus_capacity < version <= newest
            ]
            seen = notes[index][mask[index]]
            places = sum(len(note) for note in expected)
            assert len(seen) == places
            if places:
                assert torch.equal(sort_rows(seen), sort_rows(torch.cat(expected)))
            self.windows.append((row, int(read_round[index]), len(expected)))
        return notes, mask


def sort_rows(notes):
    return notes[notes[:, 0].argsort()]


@pytest.mark.parametrize(
    ("policy", "lag", "capacity"),
    [("refresh", 1, 16), ("refresh", 1, 2), ("refresh", 2, 3), ("refresh", 3, 1), ("stale", 1, 2), ("stale", 2, 3)],
)
def test_streams_read_what_the_lag_allows_and_nothing_else(judged, policy, lag, capacity):
    decoder = decoder_for(
        judged,
        bus_lag=lag,
        bus_capacity=capacity,
        agreement_threshold=0.999,
        retry_policy=policy,
        max_retries=2,
        eos_token_id=50,
    )
    spy = WindowSpy(decoder)
    with torch.no_grad():
        decoder.run()
    assert len(spy.withdrawn) > 10
    assert max(count for *_, count in spy.windows) >= min(2 * capacity, 2)


@pytest.mark.parametrize(("policy", "lag"), [("refresh", 0), ("stale", 1)])
def test_a_rewriting_reads_newer_notes_only_under_refresh(judged, policy, lag):
    decoder = decoder_for(judged, prompts=1, agreement_threshold=1.0, retry_policy=policy, max_new_tokens=4)
    lags = []
    request, refresh = decoder._request, decoder._refresh_window

    def on_refresh():
        decoder._request = lambda rows, read_round, lag: (lags.append(lag.tolist()), request(rows, read_round, lag))[1]
        refresh()
        decoder._request = request

    decoder._refresh_window = on_refresh
    with torch.no_grad():
        decoder.run()
    assert lags == [[1] * 3, [lag] * 3]


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_are_bounded_and_progress_is_certain(judged, retries):
    with torch.no_grad():
        output = decoder_for(judged, agreement_threshold=1.0, max_retries=retries, max_new_tokens=10).run()
    trace = output.trace
    for rows in output.streams:
        for row in rows:
            assert row.blocks == [(0, 4), (4, 8), (8, 10)]
            assert row.retries == 3 * retries
    assert len(trace.of_kind("rollback")) == 6 * 3 * retries
    commits = trace.of_kind("commit")
    assert all(event["forced"] and event["attempt"] == retries and event["agreement"] < 1 for event in commits)
    for event in trace.of_kind("rollback"):
        assert event["end"] - event["start"] == len(event["tokens"]) > 0


def test_a_gate_that_nothing_fails_changes_nothing(judged):
    with torch.no_grad():
        plain = decoder_for(judged).run()
        gated = decoder_for(judged, agreement_threshold=0.0).run()
    assert torch.equal(plain.sequences, gated.sequences)
    assert not gated.trace.of_kind("rollback")
    assert not any(event["forced"] for event in gated.trace.of_kind("commit"))
    assert all(0 <= event["agreement"] <= 1 for event in plain.trace.of_kind("commit"))


def test_an_untrained_gate_is_off_with_one_warning(make_model, caplog):
    model = make_model("llama", trained=True)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        output = decoder_for(model, agreement_threshold=1.0).run()
    warnings = [record for record in caplog.records if "agreement" in record.getMessage()]
    assert len(warnings) == 1
    assert "agreement_threshold=1.0 is ignored: the agreement head is not trained" in warnings[0].getMessage()
    assert not output.trace.of_kind("rollback")
    assert all(event["agreement"] is None for event in output.trace.of_kind("commit"))


class BusStub:
    num_streams = 3

    def __init__(self):
        self.withdrawn = []

    def withdraw(self, rows, rounds):
        self.withdrawn.append(rows.tolist())


def run_judge(scores, may_retry=None, threshold=0.5):
    """`scores` maps a frozenset of withdrawn rows to the agreement of rows 0 to 5."""
    bus = BusStub()
    rows = torch.arange(6)

    def score():
        gone = frozenset(row for rows in bus.withdrawn for row in rows)
        return torch.tensor(scores.get(gone, scores[frozenset()]))

    may_retry = torch.ones(6, dtype=torch.bool) if may_retry is None else torch.tensor(may_retry)
    agreement, withdrawn = judge(bus, rows, torch.zeros(6, dtype=torch.long), may_retry, threshold, score)
    return agreement.tolist(), withdrawn.nonzero().squeeze(1).tolist(), bus.withdrawn


def test_only_the_lowest_of_the_failing_rows_of_a_prompt_is_withdrawn():
    before = [0.4, 0.1, 0.3, 0.9, 0.2, 0.9]
    after = [0.8, 0.1, 0.7, 0.9, 0.2, 0.9]
    agreement, withdrawn, passes = run_judge({frozenset(): before, frozenset({1, 4}): after})
    assert withdrawn == [1, 4]
    assert passes == [[1, 4]]
    assert agreement == pytest.approx([0.8, 0.1, 0.7, 0.9, 0.2, 0.9])


def test_a_row_that_still_fails_without_the_withdrawn_note_goes_too():
    before = [0.4, 0.1, 0.9, 0.9, 0.9, 0.9]
    after = [0.3, 0.1, 0.9, 0.9, 0.9, 0.9]
    agreement, withdrawn, passes = run_judge({frozenset(): before, frozenset({1}): after})
    assert withdrawn == [0, 1]
    assert passes == [[1], [0]]
    assert agreement[1] == pytest.approx(0.1)


def test_a_row_without_retries_left_stands():
    _, withdrawn, _ = run_judge({frozenset(): [0.1] * 6}, [False] * 3 + [True, False, False])
    assert withdrawn == [3]


def test_lowest_failing_breaks_ties_by_order():
    agreement, prompt = torch.tensor([0.2, 0.2, 0.1]), torch.tensor([0, 0, 1])
    assert lowest_failing(agreement, torch.tensor([True, True, True]), prompt).tolist() == [0, 2]
    assert lowest_failing(agreement, torch.tensor([False] * 3), prompt).tolist() == []


def drawn(decoder, monkeypatch):
    """`{(prompt, stream, position, attempt): uniform}` of a run, and its output."""
    draws, rows = {}, decoder.key_R.tolist()
    assert len(set(rows)) == len(rows)

    def spy(position, attempt, state):
        values = keyed_uniform(position, attempt, state=state)
        for key, *place, value in zip(*(part.tolist() for part in (state, position, attempt, values)), strict=True):
            draws[(*divmod(rows.index(key), decoder.settings.num_streams), *place)] = value
        return values

    monkeypatch.setattr("modeling_pdt.generation_pdt.keyed_uniform", spy)
    with torch.no_grad():
        return draws, decoder.run()


def test_scaled_agreements_are_of_the_same_blocks(judged):
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 12, "eos_token_id": None, "return_dict_in_generate": True}

    def agreements(**chosen):
        events = judged.generate(ids, **options, **chosen).trace.events
        return torch.tensor([event["agreement"] for event in events if event["kind"] == "commit"])

    plain, mended = agreements(), agreements(agreement_scaling=[0.5, 1.0])
    assert torch.allclose(mended, (0.5 * plain.logit() + 1).sigmoid(), atol=1e-5)
    assert len(plain) > 3 and not torch.allclose(plain, mended, atol=1e-3)


def test_a_forced_rollback_leaves_the_siblings_draws_alone(judged, monkeypatch):
    plain, _ = drawn(decoder_for(judged, prompts=1), monkeypatch)
    decoder = decoder_for(judged, prompts=1, agreement_threshold=0.5)

    def only_stream_1(heads, states, *rest):
        rows = only_stream_1.rows
        return torch.tensor([0.0 if int(row) % 3 == 1 else 1.0 for row in rows])

    close = decoder._close_blocks

    def on_close(rows):
        only_stream_1.rows = rows
        return close(rows)

    decoder._close_blocks = on_close
    monkeypatch.setattr("modeling_pdt.generation_pdt.agreement_of", only_stream_1)
    forced, output = drawn(decoder, monkeypatch)
    assert [row.retries for row in output.streams[0]] == [0, 6, 0]
    siblings = {key: value for key, value in forced.items() if key[1] != 1}
    assert siblings == {key: value for key, value in plain.items() if key[1] != 1}
    again = {key: value for key, value in forced.items() if key[1] == 1 and key[3] == 1}
    assert len(again) == 22
    assert not set(again.values()) & set(plain.values())


def test_tokens_of_a_row_do_not_depend_on_the_batch(judged):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [30, 31]]

    def decode(order):
        length = max(len(prompts[p]) for p in order)
        ids = torch.tensor([[0] * (length - len(prompts[p])) + prompts[p] for p in order])
        output = judged.generate(
            ids,
            attention_mask=(ids > 0).long(),
            max_new_tokens=20,
            do_sample=True,
            seed=7,
            agreement_threshold=0.9,
            eos_token_id=1,
            return_dict_in_generate=True,
        )
        return {p: [row.token_ids for row in rows] for p, rows in zip(order, output.streams, strict=True)}

    reference = decode([0, 1, 2])
    assert decode([2, 0, 1]) == reference
    for prompt in range(3):
        assert decode([prompt])[prompt] == reference[prompt]


def test_equal_prompts_get_samples_of_their_own(judged):
    ids = torch.tensor([[5, 6, 7]] * 3)
    arguments = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None, "return_dict_in_generate": True}
    rows = [[row.token_ids for row in rows] for rows in judged.generate(ids, **arguments).streams]
    assert rows[0] != rows[1] and rows[1] != rows[2] and rows[0] != rows[2]
    alone = judged.generate(ids[:1], **arguments).streams[0]
    assert [row.token_ids for row in alone] == rows[0]
    other = judged.generate(ids[:1], seed=1, **arguments).streams[0]
    assert [row.token_ids for row in other] != rows[0]


def test_random_gate_withdraws_its_share_whatever_the_head_says(make_model):
    model = make_model("llama", trained=True)
    model.config._adapter_config.trained_parts = ["agreement"]
    prompts = torch.randint(2, 60, (4, 6))

    def rolled(rate):
        out = model.generate(
            prompts,
            num_streams=3,
            block_size=4,
            max_new_tokens=40,
            do_sample=True,
            eos_token_id=None,
            agreement_threshold=0.5,
            interventions=[RandomGate(rate, seed=3)],
            return_dict_in_generate=True,
        )
        assert out.trace.settings["interventions"] == ["random_gate"]
        first = [event for event in out.trace.events if event.get("attempt") == 0 and event["kind"] != "plan"]
        return len(out.trace.of_kind("rollback")) / len(first)

    assert rolled(0.0) == 0.0
    assert 0.1 < rolled(0.3) < 0.5
    # Of the rows of a prompt that fail together only one is withdrawn per pass, but each in its turn.
    assert rolled(1.0) == 1.0
    with pytest.raises(ValueError, match=r"RandomGate.rate must be in \[0, 1\], got 2"):
        RandomGate(2)
