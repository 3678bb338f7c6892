"""Parallel decoding: one trunk call per token for all rows; notes, judgement and exact rollback at block boundaries.

Letters: B prompts, S streams, R = B * S rows, M rows at a boundary, W notes of a window, P plan items, T tokens.
"""

import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from .adapter_layer import restrict_to_streams
from .bus import open_bus
from .cache import RollbackCache, TwinCache
from .cadence import Cadence
from .callbacks import CallbackList, ParallelDecodingCallback
from .decoding_kernels import grouped_eager_attention, head_logits
from .gate import RetryPolicy, agreement_of, best_items, coverage_of, judge, own_coverage
from .gate_scale import GateScale
from .generation_events import DecodingEvents
from .generation_inputs import Inputs
from .generation_settings import Settings
from .intervention_chain import InterventionChain
from .interventions import WindowRequest
from .memory import notes_memory
from .note_states import NoteStates
from .outputs import ParallelGenerateOutput, collect_output
from .prefill import header_batch, prefill_prompts
from .readings import Readings
from .safeguards import SensitivityMeter
from .sampling import choose_tokens, fold_keys, history_free, keyed_uniform, process_logits, prompt_keys
from .stalling import Stalling
from .streaming import StreamerCallback, parallel_streamer
from .streams import StreamBatch
from .trace import DecodingTrace, describe_model
from .trunk_split import TapState, rewind_tap


class ParallelDecoder:
    """
    One decoding call.

    Args:
        model (`PDTForParallelDecoding`): Trunk and adapters.
        inputs (`Inputs`), settings (`Settings`): From [`prepare_inputs`].
        streamer (*optional*): Receives committed blocks.
        callbacks (`list[ParallelDecodingCallback]`, *optional*): Receive every event.
    """

    disturbed_states: NoteStates | None = None

    def __init__(
        self,
        model: Any,
        inputs: Inputs,
        settings: Settings,
        streamer: Any = None,
        callbacks: list[ParallelDecodingCallback] | None = None,
    ) -> None:
        self.model, self.stack, self.inputs, self.settings = model, model.stack, inputs, settings
        device = self.stack.base_layer.embed_tokens.weight.device
        self.eos_ids = torch.tensor(settings.eos_ids, dtype=torch.long, device=device)
        prompt_key_B = torch.tensor(prompt_keys(inputs.prompts), device=device)
        prompt_key_R = prompt_key_B.repeat_interleave(settings.num_streams)
        stream_R = torch.arange(settings.num_streams, device=device).repeat(len(inputs.prompts))
        self.key_R = fold_keys(torch.full_like(prompt_key_R, settings.seed), prompt_key_R, stream_R)
        self.cadence = Cadence(settings.cadence, settings.block_size, settings.commit_horizon, stream_R, self.key_R)
        self.streams = StreamBatch(
            inputs.prompts,
            inputs.headers,
            settings.max_new_tokens,
            self.cadence.longest,
            model.config.trunk_hidden_size,
            device,
            self.stack.writer_tap,
        )
        self.needs_history = bool(inputs.criteria) or not history_free(inputs.processors)
        self.bus = open_bus(model.config, settings, inputs, device)
        self.stalling = Stalling(self.streams, self.bus) if settings.commit_policy == "stall" else None
        self.head = partial(head_logits, model.get_output_embeddings())
        self.retries = RetryPolicy(settings.max_retries, settings.retry_policy, settings.retry_temperature)
        self.gate_scale = GateScale(
            settings.gate_scale,
            len(inputs.headers),
            device,
            settings.gate_annealing,
            settings.flicker_guard,
            settings.agreement_threshold,
        )
        self.adapter_stream_R = self.streams.stream_R % model.config.num_streams
        # A row without header starts, and starts again, at its last prompt token, which is not conditioned.
        self.headless_R = torch.tensor([not header for header in inputs.headers], device=device)
        self.restarting = True
        self.note_states: NoteStates | None = None
        self.sensitivity = SensitivityMeter(settings.sensitivity_probe, settings.seed)
        self.interventions = InterventionChain(inputs.interventions, settings.num_streams, len(inputs.prompts))
        self.trace = self._new_trace()
        streamer = parallel_streamer(streamer, len(inputs.headers), inputs.prompts[0] + inputs.headers[0])
        callbacks = CallbackList([*(callbacks or ()), StreamerCallback(streamer)])
        self.events = DecodingEvents(self, callbacks)
        self.readings = Readings(self.bus, len(inputs.headers), callbacks.want_readings)

    def _new_trace(self) -> DecodingTrace:
        """A trace of the choices of the call and of the model."""
        settings, config, interventions = self.settings, self.model.config, self.inputs.interventions
        trace = DecodingTrace(settings={**asdict(settings), "plan": self.inputs.plan_source})
        trace.settings["interventions"] = [intervention.name for intervention in interventions]
        trace.settings["intervention_options"] = self.interventions.describe()
        trace.settings["block_tokens"] = self.cadence.intervals
        streams = range(settings.num_streams)
        trace.settings["stream_adapters"] = [stream % config.num_streams for stream in streams]
        interval, weight = min(self.cadence.intervals), self.stack.snc[0].k_proj.weight.element_size()
        memory = notes_memory(config, settings, interval, self.bus.plan_BPN.shape[1], weight)
        trace.model = {**describe_model(self.model), "notes_memory": memory}
        return trace

    def run(self) -> ParallelGenerateOutput:
        """Prefill, then one token for every live row per trunk call, until no row is live."""
        timings = self.trace.timings
        self.events.plan()
        with grouped_eager_attention(self.model.trunk):
            logits_RV = self._start()
            timings.update(prefill_s=self.events.elapsed(), exchange_s=0.0)
            self.events.tell("on_round_begin", self.streams.rows_R)
            self._choose(self.streams.rows_R, logits_RV)
            while self.streams.live_rows:
                self._step()
        timings["total_s"] = self.events.elapsed()
        self.events.tell("on_end")
        return collect_output(
            self.streams, self.settings, self.trace, separator=self.inputs.separator, merge=self.inputs.merge
        )

    def _start(self) -> torch.Tensor:
        """Prefills the prompts once, expands them to rows, feeds last prompt token and header; returns logits."""
        streams, settings = self.streams, self.settings
        lengths = [len(section.header) for section in streams.sections]
        raggedness = max(lengths) - min(lengths)
        # What is withdrawn first may be withdrawn right after the alignment of headers, before any other token.
        margin = max(settings.commit_horizon, raggedness) + 1
        kind = TwinCache if 0 < settings.logit_blend < 1 else RollbackCache
        streams.cache = kind(self.model.trunk.config, margin)
        prefill_prompts(self.stack, streams, settings.pad_id)
        return self._feed_headers()

    def _feed_headers(self) -> torch.Tensor:
        streams = self.streams
        ids, stream_ids, lengths_R = header_batch(streams, self.adapter_stream_R, self.settings.pad_id)
        longest = ids.shape[1]
        places = torch.arange(longest, device=streams.device)
        streams.mask = torch.cat([streams.mask, (places[None] < lengths_R[:, None]).long()], dim=1)
        positions = streams.position_R[:, None] + places[None]
        tap = self.stack.lower(
            input_ids=ids, attention_mask=streams.mask, position_ids=positions, past_key_values=streams.cache
        )
        self._refresh_window()
        hidden = self._upper(tap, stream_ids, self.note_states)
        self.restarting = False
        last = (lengths_R - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        streams.tap_RLD[:, :1] = tap.hidden.gather(1, last).to(streams.tap_RLD.dtype)
        streams.position_R = streams.position_R + longest
        streams.rollback(longest - lengths_R)
        return self.head(hidden.gather(1, last).squeeze(1))

    def _step(self) -> None:
        """One trunk call: consume a token per live row, exchange notes where a block is complete, choose the next."""
        streams = self.streams
        tap = self._lower()
        streams.consume(tap.hidden)
        self.trace.calls += 1
        self.restarting = False
        # The one transfer per token: which rows stand at a boundary.
        waiting_R = streams.waiting_R if streams.any_waiting else None
        complete_R = self.cadence.complete(streams.written_R, streams.fed_R, streams.attempt_R, waiting_R)
        at_boundary = streams.at_boundary(self.eos_ids, complete_R).tolist()
        if any(at_boundary):
            tap = self._exchange(tap, streams.rows_R[[row for row, flag in enumerate(at_boundary) if flag]])
            if not streams.live_rows:
                return
        stream_ids = self._stream_ids()
        disturbed = self._disturbed(tap, stream_ids)
        hidden = self._upper(tap, stream_ids, self.note_states)
        streams.keep_top(hidden)
        hidden = hidden[:, 0]
        if disturbed is not None:
            reads_A = self.note_states.mask.any(dim=1) & (stream_ids[:, 0] >= 0) & streams.live_R[streams.batch_A]
            self.events.sensitivity(streams, reads_A, self.sensitivity, self.head(hidden), disturbed)
        kept_A = streams.drop_finished()
        if kept_A is not None:
            hidden = hidden[kept_A]
            self.note_states = self.note_states and self.note_states.select_rows(kept_A)
        if not streams.any_waiting:
            self._choose(streams.batch_A, self.head(hidden))
            return
        writing_A = ~streams.waiting_R[streams.batch_A]
        self._choose(streams.batch_A[writing_A], self.head(hidden[writing_A]))
        streams.repeat_waiting()

    def _exchange(self, tap: TapState, rows_M: torch.Tensor) -> TapState:
        """What happens between the halves of a call in which rows complete a block; the tap where all rows stand."""
        started, streams = time.perf_counter(), self.streams
        if streams.any_waiting:
            rows_M = self.stalling.ready(rows_M)
            if rows_M.numel() == 0:
                return tap
        if streams.top_RLD is not None:
            self._look_up(tap)
        withdrawn_M = self._close_blocks(rows_M)
        if withdrawn_M.numel() and self.stalling is not None:
            self.stalling.hold(withdrawn_M)
        elif withdrawn_M.numel():
            tap = self._go_back(tap, withdrawn_M)
        if streams.live_rows:
            self._refresh_window()
            self.events.tell("on_round_begin", rows_M[streams.live_R[rows_M] & ~streams.waiting_R[rows_M]])
        self.trace.timings["exchange_s"] += time.perf_counter() - started
        return tap

    def _look_up(self, tap: TapState) -> None:
        """Last hidden states of this call with what the rows have read so far; the cache is as before."""
        self.streams.keep_top(self._upper(tap, self._stream_ids(), self.note_states))
        self.streams.cache.undo_update(1, tap.split)

    def _go_back(self, tap: TapState, rows_M: torch.Tensor) -> TapState:
        """The tap with these rows at the token before the block that they write again; its lower half is known."""
        streams, self.restarting = self.streams, True
        streams.withdraw(rows_M)
        self.readings.forget(rows_M)
        rows_A = streams.batch_A
        hidden = streams.tap_RLD[rows_A, streams.fed_R[rows_A], None].to(tap.hidden.dtype)
        return rewind_tap(self.stack.base_layer, tap, hidden, streams.mask, streams.position_R[rows_A, None] - 1)

    def _stream_ids(self) -> torch.Tensor:
        """Stream `[A, 1]` of the tokens just consumed."""
        stream_ids = self.adapter_stream_R
        if self.restarting:
            stream_ids = torch.where(self.headless_R & (self.streams.fed_R <= 0), -1, stream_ids)
        return stream_ids[self.streams.batch_A, None]

    def _disturbed(self, tap: TapState, stream_ids: torch.Tensor) -> torch.Tensor | None:
        """Logits `[A, V]` of this call with disturbed notes, where they are to be measured; the cache is as before."""
        states, self.disturbed_states = self.disturbed_states, None
        if states is None:
            return None
        hidden = self._upper(tap, stream_ids, states)
        self.streams.cache.undo_update(1, tap.split)
        return self.head(hidden[:, 0])

    def _upper(self, tap: TapState, stream_ids: torch.Tensor, states: NoteStates) -> torch.Tensor:
        """The upper half; tokens without a stream read no notes."""
        blend = self.settings.logit_blend
        if blend == 0:
            return self.stack.upper(tap)
        if self.restarting:
            states = replace(states, mask=restrict_to_streams(states.mask, stream_ids), biases=())
        hidden = self.stack.upper(tap, states, stream_ids)
        self.readings.read(self.streams.batch_rows, states, stream_ids)
        if blend == 1:
            return hidden
        # The head is affine: blended states have blended logits.
        return torch.lerp(self.stack.upper(replace(tap, cache=self.streams.cache.bare)), hidden, blend)

    def _lower(self) -> TapState:
        streams = self.streams
        return self.stack.lower(
            input_ids=streams.next_R[streams.batch_A, None],
            attention_mask=streams.append_mask(),
            position_ids=streams.position_R[streams.batch_A, None],
            past_key_values=streams.cache,
        )

    def _request(self, rows: torch.Tensor, read_round: torch.Tensor, lag: torch.Tensor) -> WindowRequest:
        """What some rows ask to read, after the call's interventions."""
        own_notes = read_round < self.settings.self_only_rounds if self.settings.self_only_rounds else False
        return self.interventions.request(WindowRequest(rows, rows, read_round, lag, own_notes))

    def _window(self, request: WindowRequest) -> tuple[torch.Tensor, torch.Tensor]:
        """The window that answers a request, after the call's interventions."""
        notes, mask = self.bus.window(
            request.rows, request.read_round, request.lag, request.sources, request.own_notes
        )
        return self.interventions.window(request.rows, notes, mask, self.bus.plan_BPN.shape[1])

    def _refresh_window(self) -> None:
        """Projects what every row of the batch may read now; once per exchange of notes, if anything reads."""
        streams, settings = self.streams, self.settings
        if settings.logit_blend == 0:
            return
        rows_A, lag_R = streams.batch_A, torch.full_like(streams.round_R, settings.bus_lag)
        lag_R = self.retries.lag(lag_R, streams.attempt_R)
        request = self._request(rows_A, streams.round_R[rows_A], lag_R[rows_A])
        notes, mask = self._window(request)
        scale = self.gate_scale.of(rows_A)
        scale = self.interventions.gate_scale(rows_A, scale)
        states = self.stack.project_notes(notes, mask, scale)
        biases = tuple(site.bias(states.mask) for site in self.stack.snc)
        self.note_states = replace(states, biases=biases, collected=self.readings.open(request))
        if self.sensitivity.probe is not None and bool(mask.any()) and self.sensitivity.due():
            disturbed = self.sensitivity.disturb(notes, mask)
            self.disturbed_states = replace(self.stack.project_notes(disturbed, mask, scale), biases=biases)

    def _close_blocks(self, rows_M: torch.Tensor) -> torch.Tensor:
        """Writes notes, judges and commits; returns the rows whose block is withdrawn."""
        streams, heads = self.streams, self.stack.heads
        states, previous, mask = streams.block_states(rows_M)
        span = self.settings.block_size
        if self.cadence.longest > span:
            span = mask.sum(dim=1).clamp(min=span)
        notes = heads.write(streams.writer_states(rows_M, states), mask, span)
        round_M = streams.round_R[rows_M]
        self.bus.publish(rows_M, round_M, notes)
        self.events.tell("on_note", rows_M, round_M, notes)
        coverage_MP = self._coverage(rows_M)
        present_MP = None if coverage_MP is None else self._items(self.inputs.plan_mask_BP, rows_M)
        agreement_M, withdrawn_M = None, torch.zeros_like(rows_M, dtype=torch.bool)
        if "agreement" in self.model.config.trained_parts:

            def score() -> torch.Tensor:
                lag = torch.zeros_like(round_M) if self.stalling is None else self.stalling.lag(rows_M)
                window, window_mask = self._window(self._request(rows_M, round_M, lag))
                judged = (states, previous, mask, window, window_mask, notes, coverage_MP, present_MP)
                agreement = agreement_of(heads, *judged, self.settings.agreement_scaling)
                return self.interventions.agreement(agreement, rows_M, round_M, streams.attempt_R[rows_M])

            threshold = self.settings.agreement_threshold
            may_retry = self.retries.may_retry(streams.attempt_R[rows_M])
            if threshold is None:
                agreement_M = score()
            else:
                may_wait = None
                if self.stalling is not None:
                    may_wait = partial(self.stalling.may_wait, rows_M, streams.ending(self.eos_ids)[rows_M])
                agreement_M, withdrawn_M = judge(
                    self.bus, rows_M, round_M, may_retry, threshold, score, self.settings.commit_policy, may_wait
                )
        coverage = own_coverage(rows_M, coverage_MP, self.inputs.entries, self.settings.num_streams)
        self.cadence.judged(rows_M, agreement_M)
        self.gate_scale.judged(rows_M, agreement_M, withdrawn_M, best_items(coverage_MP, present_MP))
        records = zip(self.cadence.record(rows_M), self.gate_scale.record(rows_M), strict=True)
        details = [{**cadence, **gate} for cadence, gate in records]
        threshold = self.settings.agreement_threshold
        withdrawn = withdrawn_M.tolist()
        self.events.judged(streams, rows_M, agreement_M, withdrawn, coverage, threshold, details)
        standing = [index for index, gone in enumerate(withdrawn) if not gone]
        self._commit(rows_M[standing], [coverage[index] for index in standing])
        return rows_M[[index for index, gone in enumerate(withdrawn) if gone]]

    def _coverage(self, rows_M: torch.Tensor) -> torch.Tensor | None:
        if not self.inputs.num_items:
            return None
        text, mask = self.streams.own_text(rows_M)
        return coverage_of(self.stack.heads, text, mask, self._items(self.inputs.plan_BPN, rows_M).float())

    def _items(self, values_BP: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Values of the plan items of each row's prompt."""
        return values_BP[self.streams.prompt_R[rows_M], : self.inputs.num_items]

    def _commit(self, rows_M: torch.Tensor, coverage: list[dict[int, float]]) -> None:
        streams = self.streams
        if rows_M.numel() == 0:
            return
        sections = streams.commit(rows_M)
        self.readings.commit(rows_M)
        streams.finish(rows_M[streams.ending(self.eos_ids)[rows_M]], self.eos_ids)
        for section, covered in zip(sections, coverage, strict=True):
            section.coverage = covered
        self.events.committed()

    def _choose(self, rows_M: torch.Tensor, logits_MV: torch.Tensor) -> None:
        """The next token of each row, from its own history and its own randomness."""
        streams, settings = self.streams, self.settings
        attempt_M = streams.attempt_R[rows_M]
        logits_MV = self.retries.temper(logits_MV.float(), attempt_M)
        histories, processors = [], self.inputs.processors[: len(rows_M)]
        if self.needs_history:
            histories = streams.histories(rows_M)
            processors = [self.inputs.processors[row] for row in rows_M.tolist()]
        scores = process_logits(logits_MV, processors, histories)
        uniform = None
        if settings.do_sample:
            uniform = keyed_uniform(streams.fed_R[rows_M], attempt_M, state=self.key_R[rows_M])
        tokens = choose_tokens(scores, settings.do_sample, uniform)
        streams.choose(rows_M, tokens)
        self.readings.choose(rows_M)
        self.events.tell("on_token", rows_M, tokens, scores)
        if self.inputs.criteria:
            for row, history, token, score in zip(rows_M.tolist(), histories, tokens, scores, strict=True):
                done = self.inputs.criteria(torch.cat([history, token[None]])[None], score[None])
                streams.stop_R[row] = bool(done.all())
