"""
A slow decoder to compare with: it follows the documents and has neither cache, batch, padding nor rollback.

Every token of every row comes from one forward over all that the row consists of by then, in which each token reads
the notes that it read when it was consumed; see `decoding_reference_model` and `decoding_reference_window`. Notes,
coverage and agreement are made from texts alone. A block that is withdrawn is cut off a list.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from modeling_pdt.cadence import CADENCE_KEY
from modeling_pdt.policies import CadencePolicy, FlickerGuard, GateAnnealing
from modeling_pdt.sampling import fold_keys, keyed_uniform, prompt_keys
from tests.decoding_reference_model import Reading, TextModel
from tests.decoding_reference_window import Windows


@dataclass
class Choices:
    """Choices of a call, as the keyword arguments of `generate` name them; every field is given there too."""

    num_streams: int = 2
    max_new_tokens: int = 10
    block_size: int = 4
    commit_horizon: int = 4
    bus_lag: int = 1
    bus_capacity: int = 16
    retention: str = "fifo"
    retention_score: str = "novelty"
    topology: list[tuple[int, int]] | None = None
    self_notes: bool = False
    self_only_rounds: int = 0
    max_retries: int = 1
    retry_policy: str = "refresh"
    commit_policy: str = "stream"
    agreement_threshold: float | None = None
    cadence: dict[str, Any] | None = None
    gate_scale: float = 1.0
    gate_annealing: dict[str, Any] | None = None
    flicker_guard: dict[str, Any] | None = None
    logit_blend: float = 1.0
    eos_token_id: list[int] | None = None
    do_sample: bool = False
    retry_temperature: float = 0.5
    repetition_penalty: float | None = None
    plan: str | None = None
    seed: int = 0


@dataclass(eq=False)
class Row:
    """A stream of a prompt: what it has written, what it reads now, and what each token after the prompt has read."""

    number: int
    prompt: int
    stream: int
    start: list[int]
    header: list[int]
    scale: float
    tokens: list[int] = field(default_factory=list)
    reading: Reading | None = None
    readings: list[Reading] = field(default_factory=list)
    shares: list[dict] = field(default_factory=list)
    next_token: int = -1
    block_start: int = 0
    round: int = 0
    attempt: int = 0
    retries: int = 0
    live: bool = True
    waiting: bool = False
    heard: int = 0
    last_agreement: float = 1.0
    cooldown: int = 0
    scales: list[float] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return self.start + self.header + self.tokens


class ReferenceDecoder:
    """
    Decodes token lists.

    Args:
        model: A PDT model; its agreement head decides if it counts as trained.
        choices: Of the call.
        prompts, headers: Tokens `[prompt]` and `[row]`.
        items: Plan items of every prompt: tokens, and the stream that owns them.
        seeds: Vectors `[places, N]` that are on the bus from the start.
        interventions: In order.
    """

    def __init__(self, model, choices, prompts, headers, items=None, seeds=None, interventions=()):
        self.choices, self.text = choices, TextModel(model, choices)
        self.judging = "agreement" in model.config.trained_parts
        self.annealing = choices.gate_annealing and GateAnnealing(**choices.gate_annealing)
        self.guard = choices.flicker_guard and FlickerGuard(**choices.flicker_guard)
        self.cadence = CadencePolicy(**(choices.cadence or {}))
        self.longest = self._longest_block()
        streams, self.calls, self.closest = choices.num_streams, 0, math.inf
        places = [divmod(number, streams) for number in range(len(headers))]
        self.rows = [Row(i, p, s, prompts[p], headers[i], choices.gate_scale) for i, (p, s) in enumerate(places)]
        keys = prompt_keys(prompts)
        self.keys = [self._key(keys[row.prompt], row.stream) for row in self.rows]
        self.items = items or [[] for _ in prompts]
        texts = [[ids for ids, _ in row] for row in self.items]
        self.plans = [self.text.plan(*one) for one in zip(prompts, texts, strict=True)]
        snapshots = [plan if seeds is None else torch.cat([plan, seeds]) for plan in self.plans]
        self.windows = Windows(choices, snapshots, interventions, self._close)

    def run(self):
        """Writes all rows, one token of each at a time."""
        for row in self.rows:
            row.reading = self._reading(row)
            row.readings = [row.reading] * len(row.header)
            row.next_token = self._choose(row)
        while any(row.live for row in self.rows):
            self.calls += 1
            live = [row for row in self.rows if row.live]
            for row in live:
                row.tokens += [] if row.waiting else [row.next_token]
            boundary = [row for row in live if not row.waiting and self._ends_block(row)]
            boundary += [row for row in live if row.waiting and self._knows_more(row, boundary)]
            if boundary:
                self._exchange(boundary)
                for row in live:
                    row.reading = self._reading(row)
            for row in live:
                # A withdrawn row stands at the token before its block again, which now reads anew.
                length = len(row.header) + len(row.tokens)
                row.readings = [*row.readings[: max(0, length - 1)], row.reading][:length]
                if row.live and not row.waiting:
                    row.next_token = self._choose(row)
        return self.rows

    def _choose(self, row):
        """The next token, after the penalty for tokens of the row's own text: the likeliest, or one that is drawn."""
        scores = self.text.logits(row)
        if row.readings and self.choices.logit_blend > 0:
            row.shares.append(self.text.shares(row))
        scores = scores / self.choices.retry_temperature ** max(0, row.attempt - 1)
        if self.choices.repetition_penalty is not None:
            seen = torch.tensor(sorted(set(row.text)))
            kept, penalty = scores[seen], self.choices.repetition_penalty
            scores[seen] = torch.where(kept < 0, kept * penalty, kept / penalty)
        if not self.choices.do_sample:
            self._close(scores.topk(2).values.diff().abs())
            return int(scores.argmax())
        reached = scores.double().softmax(dim=-1).cumsum(dim=-1) - self._draw(row, self.keys[row.number])
        self._close(reached.abs().min())
        return int((reached > 0).nonzero()[0])

    def _draw(self, row, key):
        """A number in [0, 1) for the row's next decision."""
        return float(keyed_uniform(torch.tensor([len(row.tokens)]), torch.tensor([row.attempt]), state=key))

    def _score(self, row, coverage):
        """Agreement of the row's block with what is on the bus."""
        ahead = max([row.round, *self.windows.from_sources(row)]) - row.round if row.waiting else 0
        score = self.text.score(row, self.windows.read(row, lag=-ahead), coverage)
        return self.windows.agreement(row, score)

    # Blocks: when they end, what is decided about them, and what follows.

    def _key(self, prompt_key, stream):
        return fold_keys(*(torch.tensor([part]) for part in (self.choices.seed, prompt_key, stream)))

    def _interval(self, stream):
        """M: tokens, or a share rho that stands for tokens."""
        policy, value = self.cadence, self.cadence.interval
        value = value[stream] if isinstance(value, list) else value
        if isinstance(value, float):
            low, high = math.log(policy.interval_min), math.log(policy.interval_max)
            return math.ceil(round(math.exp(value * low + (1 - value) * high), 9))
        return self.choices.block_size if value is None else value

    def _longest_block(self):
        if self.cadence.mode == "deterministic":
            longest = max(self._interval(stream) for stream in range(self.choices.num_streams))
            return min(longest, self.cadence.max_interval or longest)
        return self.cadence.max_interval or self.choices.commit_horizon

    def _ended(self, row):
        eos = self.choices.eos_token_id or []
        return row.tokens[-1] in eos or len(row.tokens) >= self.choices.max_new_tokens

    def _ends_block(self, row):
        policy, interval = self.cadence, self._interval(row.stream)
        written = len(row.tokens) - row.block_start
        if self._ended(row) or written >= self.longest:
            return True
        if policy.mode == "deterministic":
            return written >= interval
        probability = max(policy.min_probability, 1 / interval)
        if policy.mode == "adaptive":
            share = (row.last_agreement - policy.agreement_low) / (policy.agreement_high - policy.agreement_low)
            low, high = policy.multiplier_min, policy.multiplier_max
            multiplier = high + (low - high) * min(1, max(0, share))
            multiplier *= 1 + policy.age_boost * max(0, written / interval - 1)
            probability = max(policy.min_probability, probability * min(high, max(low, multiplier)))
        draw = self._draw(row, fold_keys(torch.tensor([CADENCE_KEY]), state=self.keys[row.number]))
        self._close(abs(draw - probability))
        return draw < probability

    def _exchange(self, rows):
        """Notes of all rows that end a block, then the judgement, then commits and withdrawals."""
        rows, stalls = sorted(rows, key=lambda row: row.number), self.choices.commit_policy == "stall"
        for row in rows:
            self.windows.publish(row, self.text.note(row))
        coverage = {row.number: self.text.coverage(row, self.plans[row.prompt]) for row in rows}
        scores, withdrawn = self._judge(rows, coverage)
        for row in rows:
            gone, score = row.number in withdrawn, scores.get(row.number)
            row.last_agreement = row.last_agreement if score is None else score
            row.best.append(self._best(coverage[row.number]))
            self._anneal(row, score, gone)
            kind = ("stall" if stalls else "rollback") if gone else "commit"
            start, end = row.block_start, len(row.tokens)
            event = {"kind": kind, "round": row.round, "attempt": row.attempt, "start": start, "end": end}
            event |= {"tokens": row.tokens[start:], "call": self.calls, "agreement": score}
            items = zip(self.items[row.prompt], coverage[row.number], strict=False)
            owned = {i: value for i, ((_, owner), value) in enumerate(items) if owner in (None, row.stream)}
            forced = not gone and None not in (score, self.choices.agreement_threshold)
            event["forced"] = (forced and score < self.choices.agreement_threshold) if kind == "commit" else None
            row.events.append({**event, "coverage": owned})
            row.waiting = gone and stalls
            if row.waiting:
                row.attempt, row.heard = row.attempt + 1, len(self.windows.from_sources(row))
            elif gone:
                row.shares = []
                row.tokens = row.tokens[: row.block_start]
                row.attempt, row.retries = row.attempt + 1, row.retries + 1
            else:
                row.blocks.append((start, end))
                row.block_start, row.round, row.attempt = end, row.round + 1, 0
                row.live = not self._ended(row)
        standing = [row for row in rows if row.number not in withdrawn]
        self.windows.receive([row.shares for row in standing])
        for row in standing:
            row.shares = []

    def _judge(self, rows, coverage):
        """
        Scores by row, and the rows that are withdrawn: of a prompt's failing rows with a retry left the lowest goes,
        the others are judged again without its note; under `"round"` all go when one of them fails.
        """
        threshold, withdrawn, scores = self.choices.agreement_threshold, set(), {}
        if not self.judging:
            return scores, withdrawn
        while True:
            judged = [row for row in rows if row.number not in withdrawn]
            scores |= {row.number: self._score(row, coverage[row.number]) for row in judged}
            if threshold is None:
                return scores, withdrawn
            retrying = [row for row in judged if row.attempt < self.choices.max_retries]
            self._close(min([abs(scores[row.number] - threshold) for row in retrying], default=math.inf))
            failing = [row for row in retrying if scores[row.number] < threshold]
            if self.choices.commit_policy == "stall":
                failing = [row for row in failing if self._may_wait(row, rows, withdrawn)]
            if self.choices.commit_policy == "round":
                prompts = {row.prompt for row in failing}
                going = [row for row in retrying if row.prompt in prompts]
            else:
                going = self._lowest(failing, scores)
            for row in going:
                withdrawn.add(row.number)
                self.windows.withdraw(row)
            if not going or self.choices.commit_policy == "round":
                return scores, withdrawn

    def _may_wait(self, row, judged, withdrawn):
        """Whether a stream that the row reads goes on writing."""
        stopped = {other.number for other in judged if self._ended(other)} | withdrawn
        stopped |= {other.number for other in self.rows if other.waiting and other not in judged}
        return any(other.number not in stopped for other in self._live_sources(row))

    def _live_sources(self, row):
        first = row.number - row.stream
        return [self.rows[first + s] for s in self.windows.sources(row) if self.rows[first + s].live]

    def _knows_more(self, row, completing):
        """Whether a row that waits is judged again: by new notes, or since nobody that it reads is writing."""
        sources = self._live_sources(row)
        news = len(self.windows.from_sources(row)) > row.heard or any(other in completing for other in sources)
        return news or all(other.waiting for other in sources)

    def _lowest(self, failing, scores):
        """The failing row with the lowest score of every prompt; the first of equals."""
        lowest = []
        for prompt in sorted({row.prompt for row in failing}):
            order = sorted((row for row in failing if row.prompt == prompt), key=lambda row: scores[row.number])
            if len(order) > 1 and scores[order[0].number] not in (0, 1):
                self._close(scores[order[1].number] - scores[order[0].number])
            lowest.append(order[0])
        return lowest

    def _anneal(self, row, score, withdrawn):
        """The row's gate scale after a decision."""
        policy = self.annealing
        if not policy:
            return
        bar = self.choices.agreement_threshold + policy.stability_margin
        self._close(abs(score - bar))
        if withdrawn or score < bar:
            row.scale, row.cooldown = max(policy.min_value, row.scale * policy.decay), policy.cooldown
        elif row.cooldown:
            row.cooldown -= 1
        else:
            row.scale = min(self.choices.gate_scale, row.scale + policy.recovery)
        row.scales.append(row.scale)

    def _best(self, coverage):
        """The item that is covered best, where watched and there are any."""
        if not coverage or not self.guard or self.guard.max_switches is None:
            return 0
        two = sorted(coverage)[-2:]
        self._close(two[-1] - two[0] if len(two) > 1 else math.inf)
        return coverage.index(two[-1])

    def _scale(self, row):
        """What multiplies the gate: the row's scale, or the clamp while it flickers."""
        guard = self.guard
        if guard and guard.clamp is not None and len(row.best) >= guard.window:
            best, scales = row.best[-guard.window :], row.scales[-guard.window :]
            spread = torch.tensor(scales).std(correction=0) if scales else 0.0
            self._close(abs(float(spread) - guard.max_std))
            switches = sum(one != other for one, other in zip(best[1:], best[:-1], strict=True))
            if spread > guard.max_std or (guard.max_switches is not None and switches > guard.max_switches):
                return guard.clamp
        return row.scale

    def _reading(self, row):
        """What the row's tokens read from now on."""
        rewriting = row.attempt > 0 and self.choices.retry_policy == "refresh"
        places = []
        notes = self.windows.read(row, 0 if rewriting else self.choices.bus_lag, places)
        return Reading(notes, self.windows.gate_scale(row, self._scale(row)), places)

    def _close(self, gap):
        """Remembers how close the closest decision was."""
        self.closest = min(self.closest, float(gap))
