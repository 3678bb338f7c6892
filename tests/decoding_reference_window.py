"""What a row of the reference decoder reads: the notes that are published, by the documents' rules, one by one."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from modeling_pdt.sampling import keyed_uniform


@dataclass
class Request:
    """Whose place the reader takes, the round it writes, its lag, and whether it asks for its own notes."""

    prompt: int
    stream: int
    round: int
    lag: int
    own: bool


class Windows:
    """
    The notes of all rows, and the windows made of them.

    Args:
        choices: Of the call.
        snapshots: Snapshot 0 of every prompt, `[places, N]`.
        interventions: In order; their names and arguments are read, their methods are not called.
        close: Called with how close a decision was.
    """

    def __init__(self, choices, snapshots, interventions, close):
        self.choices, self.snapshots, self.interventions, self.close = choices, snapshots, interventions, close
        # Notes [K, N] by (prompt, stream, round), how novel they were when they were published, and the attention that
        # they have got.
        self.notes, self.novelty, self.attention = {}, {}, {}

    def publish(self, row, notes):
        place = row.prompt, row.stream, row.round
        assert place not in self.notes
        before = [
            self.notes[row.prompt, row.stream, other] for other in self._rounds(row.prompt, row.stream, row.round)
        ]
        likeness = [float(cosine_similarity(notes.mean(0), other.mean(0), dim=0)) for other in before]
        self.notes[place], self.novelty[place], self.attention[place] = notes, 1 - max(likeness, default=0.0), 0.0

    def receive(self, blocks):
        """Blocks that stand together, as what each of their tokens gave to the rounds that it saw."""
        values = {}
        for shares in blocks:
            for place in {place for one in shares for place in one}:
                seen = [one[place] for one in shares if place in one]
                values.setdefault(place, []).append(sum(seen) / len(seen))
        for place, given in values.items():
            before, value = self.attention[place], sum(given) / len(given)
            self.attention[place] = 0.9 * before + 0.1 * value if before else value

    def withdraw(self, row):
        del self.notes[row.prompt, row.stream, row.round]

    def read(self, row, lag, places=None):
        """What the row may read, `[W, N]`: the plan first; `places` receives whose notes these are."""
        own = row.round < self.choices.self_only_rounds
        request = Request(row.prompt, row.stream, row.round, lag, own)
        for one in self._concerning(row):
            self._edit_request(one, request)
        seen = [
            (None if merged else (request.prompt, producer, version), notes)
            for producer in range(self.choices.num_streams)
            if self._reads(request, producer)
            for version, notes, merged in self._kept(request, producer)
            if producer != request.stream or version < request.round
        ]
        plan = self.snapshots[row.prompt]
        notes = torch.cat([plan[:0], *(notes for _, notes in seen)])
        for one in self._concerning(row):
            plan, notes = self._edit_window(one, plan, notes)
        if places is not None:
            whose = [place for place, notes in seen for _ in notes][: len(notes)]
            places += [None] * len(plan) + whose
        return torch.cat([plan, notes])

    def sources(self, row):
        """The siblings that the row reads."""
        streams, topology = range(self.choices.num_streams), self.choices.topology
        return [s for s in streams if s != row.stream and (topology is None or (s, row.stream) in topology)]

    def from_sources(self, row):
        """Rounds that the row's sources have published."""
        return [v for p, s, v in self.notes if p == row.prompt and s in self.sources(row)]

    def gate_scale(self, row, scale):
        return 0.0 if any(one.name == "gate_zero" for one in self._concerning(row)) else scale

    def agreement(self, row, score):
        """The score that decides: the head's, or one that is drawn."""
        for one in self._concerning(row):
            if one.name == "random_gate":
                place = [torch.tensor([value]) for value in (one.seed, row.number, row.round, row.attempt)]
                score = float(keyed_uniform(*place) >= one.rate)
        return score

    def _concerning(self, row):
        return [one for one in self.interventions if one.streams is None or row.stream in one.streams]

    def _edit_request(self, one, request):
        if one.name == "swap":
            prompts = len(self.snapshots)
            donors = one.donors or [(prompt + 1) % prompts for prompt in range(prompts)]
            request.prompt = donors[request.prompt]
        elif one.name == "stale":
            request.lag += one.rounds
        elif one.name == "freeze":
            request.lag = request.lag if request.round < one.round else max(0, request.lag)
            request.round = min(request.round, one.round)
        elif one.name == "self_only":
            request.own = True

    def _edit_window(self, one, plan, notes):
        if one.name == "ablate":
            return (plan[:0] if one.plan else plan), notes[:0]
        if one.name == "zero_notes":
            return plan, torch.zeros_like(notes)
        if one.name == "norm_scramble":
            generator = torch.Generator().manual_seed(one.seed)
            order = torch.randperm(notes.shape[1], generator=generator)
            return plan, notes[:, order] * (torch.randint(0, 2, notes.shape[1:], generator=generator) * 2 - 1)
        if one.name == "shuffle":
            generator = torch.Generator().manual_seed(one.seed)
            return plan, notes.gather(0, torch.rand(notes.shape, generator=generator).argsort(dim=0))
        return plan, notes

    def _reads(self, request, producer):
        """Whether the reader reads this stream at all."""
        own, choices = producer == request.stream, self.choices
        if request.own:
            return own
        if own and choices.self_notes:
            return True
        return not own if choices.topology is None else (producer, request.stream) in choices.topology

    def _rounds(self, prompt, stream, end):
        """Published rounds of a stream before `end`, in order."""
        return sorted(v for p, s, v in self.notes if (p, s) == (prompt, stream) and v < end)

    def _kept(self, request, producer):
        """
        The notes that retention keeps of a stream, as (newest round in them, notes `[K, N]`, whether they are merged),
        oldest first.
        """
        capacity, retention = self.choices.bus_capacity, self.choices.retention
        places = capacity - (retention in ("compressed", "hybrid"))
        scored = places // 2 if retention in ("scored", "hybrid") else 0
        newest = request.round - request.lag
        rounds = self._rounds(request.prompt, producer, newest + 1)
        stored = {version: self.notes[request.prompt, producer, version] for version in rounds}
        recent = [version for version in rounds if version > newest - (places - scored)]
        if retention == "fifo":
            return [(version, stored[version], False) for version in recent]
        older = [version for version in rounds if version not in recent]
        scores = self.novelty if self.choices.retention_score == "novelty" else self.attention
        score = {version: scores[request.prompt, producer, version] for version in older}
        ranked = sorted(older, key=lambda version: -score[version])
        # Rounds that nobody has read yet are equals, the first of them comes first.
        if 0 < scored < len(ranked) and (scores is self.novelty or score[ranked[scored - 1]] > 0):
            self.close(score[ranked[scored - 1]] - score[ranked[scored]])
        chosen = sorted(ranked[:scored])
        rest = [version for version in older if version not in chosen]
        kept = [(version, stored[version], False) for version in chosen + recent]
        if retention in ("compressed", "hybrid") and rest:
            kept.insert(0, (rest[-1], mean_notes([stored[version] for version in rest]), True))
        return kept


def mean_notes(notes):
    """The mean of rounds of notes, with the mean of their norms."""
    mean = torch.stack(notes).mean(0)
    norm = torch.stack([note.norm(dim=-1, keepdim=True) for note in notes]).mean(0)
    return mean * norm / mean.norm(dim=-1, keepdim=True)
