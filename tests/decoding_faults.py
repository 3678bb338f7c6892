"""Faults that are planted in the decoder one at a time, to see that its comparison with the reference notices them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from modeling_pdt import bus, gate, generation_pdt
from modeling_pdt.cache import RollbackCache, TwinCache
from modeling_pdt.cadence import Cadence
from modeling_pdt.gate import RetryPolicy
from modeling_pdt.gate_scale import GateScale
from modeling_pdt.generation_pdt import ParallelDecoder
from modeling_pdt.note_states import NoteStates
from modeling_pdt.readings import Readings, ReceivedAttention
from modeling_pdt.snc import SharedNotesCrossAttention
from modeling_pdt.stalling import Stalling
from modeling_pdt.streams import StreamBatch
from tests.decoding_cases import MID, TOP


@dataclass(frozen=True)
class Fault:
    """`owner.name` is replaced by what `make` returns for it; calls of `models` are to notice."""

    owner: Any
    name: str
    make: Callable[[Callable], Callable]
    models: tuple[str, ...]

    def plant(self, monkeypatch):
        monkeypatch.setattr(self.owner, self.name, self.make(getattr(self.owner, self.name)))


FAULTS: dict[str, Fault] = {}


def fault(owner, name, models=MID):
    """Registers a fault under the name of the function that makes it."""

    def register(make):
        FAULTS[make.__name__] = Fault(owner, name, make, models)
        return make

    return register


# Who reads what.


@fault(RetryPolicy, "lag")
def lag_off_by_one(lag):
    return lambda self, lag_R, attempt_R: lag(self, lag_R, attempt_R) + (attempt_R == 0)


@fault(RetryPolicy, "lag")
def retry_reads_old_notes(lag):
    return lambda self, lag_R, attempt_R: lag_R


@fault(bus.NotesBus, "_places")
def note_of_the_wrong_producer(places):
    def make(self, prompt, newest):
        notes, version = places(self, prompt, newest)
        return notes.roll(1, dims=1), version

    return make


@fault(bus, "visible_notes")
def self_notes_leak(visible_notes):
    def make(stream, read_round, lag, producer, version, *further):
        seen = visible_notes(stream, read_round, lag, producer, version, *further)
        return seen | ((producer == stream[:, None]) & (version >= 0) & (version < read_round[:, None]))

    return make


@fault(bus.NotesBus, "__init__")
def window_one_round_longer(init):
    return lambda self, prompts, streams, notes, width, capacity, *further: init(
        self, prompts, streams, notes, width, capacity + 1, *further
    )


@fault(bus.NotesBus, "__init__")
def plan_of_the_next_prompt(init):
    def make(self, *arguments):
        init(self, *arguments)
        self.plan_BPN, self.plan_mask_BP = self.plan_BPN.roll(1, 0), self.plan_mask_BP.roll(1, 0)

    return make


@fault(bus, "select_older")
def retention_keeps_the_lowest_score(select_older):
    return lambda old, score, places: select_older(old, -score, places)


@fault(Readings, "forget")
def withdrawn_blocks_give_attention(forget):
    return lambda self, rows: None


@fault(ReceivedAttention, "MOMENTUM")
def newest_readers_alone_give_attention(momentum):
    return 0.0


@fault(bus, "merge_rounds")
def merged_rounds_lose_their_norm(merge_rounds):
    def make(notes, rest):
        weight = rest.to(notes)[..., None, None]
        mean = (notes * weight).sum(dim=2, keepdim=True) / weight.sum(dim=2, keepdim=True).clamp(min=1)
        return mean, merge_rounds(notes, rest)[1]

    return make


@fault(ParallelDecoder, "_refresh_window")
def window_is_not_refreshed_after_a_retry(refresh):
    return lambda self: None if self.restarting and self.note_states is not None else refresh(self)


@fault(NoteStates, "select_rows")
def rows_that_stay_read_their_neighbours_window(select_rows):
    return lambda self, rows: select_rows(self, rows.sort().values)


@fault(SharedNotesCrossAttention, "forward")
def gate_scale_misses_one_site(forward):
    def make(self, hidden, note_states, site):
        return forward(self, hidden, replace(note_states, gate_scale=1.0) if site == 1 else note_states, site)

    return make


# Rollback.


@fault(RollbackCache, "rollback")
def rollback_keeps_one_token_too_many(rollback):
    return lambda self, counts: rollback(self, (counts - 1).clamp(min=0))


@fault(TwinCache, "rollback")
def rollback_forgets_the_bare_cache(rollback):
    return lambda self, counts: RollbackCache.rollback(self, counts)


@fault(StreamBatch, "rollback")
def freed_slots_stay_visible(rollback):
    def make(self, counts):
        mask = self.mask
        rollback(self, counts)
        self.mask = torch.maximum(self.mask, mask)

    return make


@fault(StreamBatch, "withdraw")
def wrong_position_after_a_retry(withdraw):
    def make(self, rows):
        withdraw(self, rows)
        self.position_R = self.position_R.index_add(0, rows, torch.ones_like(rows))

    return make


@fault(ParallelDecoder, "_feed_headers")
def short_headers_keep_the_longest_ones_positions(feed_headers):
    def make(self):
        logits = feed_headers(self)
        self.streams.position_R = self.streams.position_R.view(-1, self.settings.num_streams).amax(1)[
            self.streams.prompt_R
        ]
        return logits

    return make


@fault(generation_pdt, "keyed_uniform")
def retry_draws_the_same_tokens(keyed_uniform):
    return lambda fed, attempt, state: keyed_uniform(fed, torch.zeros_like(attempt), state=state)


@fault(RetryPolicy, "temper")
def retries_stay_warm(temper):
    return lambda self, logits, attempt: logits


# Judgement.


@fault(gate, "lowest_failing")
def highest_agreement_goes_first(lowest_failing):
    return lambda agreement, failing, prompt: lowest_failing(-agreement, failing, prompt)


@fault(generation_pdt, "judge")
def round_is_judged_row_by_row(judge):
    def make(*arguments):
        *arguments, policy, may_wait = arguments
        return judge(*arguments, "stream" if policy == "round" else policy, may_wait)

    return make


@fault(generation_pdt, "coverage_of")
def coverage_of_the_next_item(coverage_of):
    return lambda *arguments: coverage_of(*arguments).roll(1, dims=1)


@fault(StreamBatch, "own_text")
def coverage_misses_the_last_token(own_text):
    def make(self, rows):
        text, mask = own_text(self, rows)
        last = mask.sum(dim=1) - 1
        mask[torch.arange(len(rows))[last > 0], last[last > 0]] = False
        return text, mask

    return make


@fault(StreamBatch, "block_states")
def agreement_asks_from_the_same_position(block_states):
    def make(self, rows):
        states, _, mask = block_states(self, rows)
        return states, states, mask

    return make


@fault(ParallelDecoder, "_look_up", TOP)
def writer_misses_the_last_token(look_up):
    return lambda self, tap: None


@fault(ParallelDecoder, "_look_up", TOP)
def last_token_has_read_the_new_window(look_up):
    def make(self, tap):
        rounds = self.streams.round_R
        self.streams.round_R = rounds + 1
        self._refresh_window()
        self.streams.round_R = rounds
        look_up(self, tap)

    return make


@fault(StreamBatch, "writer_states", TOP)
def writer_reads_the_tap(writer_states):
    return lambda self, rows, states: states


@fault(Stalling, "lag")
def waiting_row_hears_no_later_round(lag):
    return lambda self, rows: torch.zeros_like(rows)


@fault(Stalling, "ready")
def waiting_row_is_judged_again_at_once(ready):
    return lambda self, rows: rows


@fault(Stalling, "hold")
def stall_withdraws_the_note_of_a_sibling(hold):
    def make(self, rows):
        hold(self, rows)
        sibling = rows // self.bus.num_streams * self.bus.num_streams + (rows + 1) % self.bus.num_streams
        self.bus.withdraw(sibling, self.streams.round_R[rows].clamp(max=self.bus.published_BSV.shape[2] - 1))

    return make


# Blocks, ends and scales.


@fault(StreamBatch, "at_boundary")
def eos_waits_for_the_end_of_the_block(at_boundary):
    def make(self, eos_ids, complete=None):
        return at_boundary(self, eos_ids[:0], complete)

    return make


@fault(StreamBatch, "histories")
def penalty_forgets_the_header(histories):
    def make(self, rows):
        prompts = [torch.tensor(self.prompts[row // self.num_streams]) for row in rows.tolist()]
        fed = self.fed_R[rows].tolist()
        return [
            torch.cat([prompt, self.tokens_RL[row, :tokens]])
            for prompt, row, tokens in zip(prompts, rows.tolist(), fed, strict=True)
        ]

    return make


@fault(Cadence, "judged")
def cadence_ignores_agreement(judged):
    return lambda self, rows, agreement: None


@fault(GateScale, "judged")
def gate_recovers_without_cooldown(judged):
    def make(self, *arguments):
        self.cooldown_R = torch.zeros_like(self.cooldown_R)
        judged(self, *arguments)

    return make


@fault(GateScale, "of")
def flickering_gate_is_not_clamped(of):
    return lambda self, rows: self.gate_scale if self.annealing is None else self.scale_R[rows]


@fault(GateScale, "_watch")
def changes_of_the_best_item_do_not_flicker(watch):
    return lambda self, rows, items: watch(self, rows, torch.zeros_like(rows))
