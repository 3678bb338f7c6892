"""What the trunk, the adapters and the heads say of a row of the reference decoder, from texts alone."""

from dataclasses import dataclass, field, replace

import torch
from transformers.activations import ACT2FN

from modeling_pdt.trunk_split import run_upper


@dataclass(eq=False)
class Reading:
    """
    What a token reads: notes `[W, N]`, the gate's scale, whose notes these are (prompt, stream, round; `None` for the
    plan and for merged rounds), and keys and values by site of SNC.
    """

    notes: torch.Tensor
    scale: float
    places: list[tuple[int, int, int] | None]
    projected: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class TextModel:
    """
    A model asked about whole texts. Stream adapters and SNC are written out here, for one row and without padding.

    Args:
        model: A PDT model.
        choices: Of the call.
    """

    def __init__(self, model, choices):
        self.model, self.stack, self.heads, self.choices = model, model.stack, model.stack.heads, choices
        self.taps, self.attention = {}, []

    def tap(self, ids):
        """The lower half over a text, which depends on nothing else."""
        if tuple(ids) not in self.taps:
            self.taps[tuple(ids)] = self.stack.lower(input_ids=torch.tensor([ids]))
        return self.taps[tuple(ids)]

    def states(self, ids):
        return self.tap(ids).hidden

    def plan(self, prompt, items):
        """Vectors `[places, N]` of the plan items of a prompt, given as tokens."""
        nothing = torch.zeros(0, self.model.config.notes_dim)
        if self.choices.plan == "planner":
            real = torch.ones(1, len(prompt), dtype=torch.bool)
            slots = self.heads.planner(self.states(prompt), real).argmax(dim=-1)[0]
            return self.heads.embed_slots(slots[slots > 0])
        made = [self.heads.encode_items(self.states(ids), torch.ones(1, len(ids), dtype=torch.bool)) for ids in items]
        return torch.cat([nothing, *made])

    def logits(self, row):
        """Logits of the next token: one forward over the whole text."""
        return self.model.get_output_embeddings()(self.last_states(row)[0, -1])

    def last_states(self, row):
        """What the head reads, over the whole text; the head is affine, so blended states have blended logits."""
        self.attention = []
        tap, blend = self.tap(row.text), self.choices.logit_blend
        conditioned = self._upper(tap, row) if blend > 0 else 0
        return blend * conditioned + (1 - blend) * self.stack.upper(tap) if blend < 1 else conditioned

    def shares(self, row):
        """Share of attention that every round got from the row's last token, in the logits made last."""
        mean, shares = torch.stack(self.attention).mean(0), {}
        for place, weight in zip(row.readings[-1].places, mean.tolist(), strict=True):
            if place is not None:
                shares[place] = shares.get(place, 0) + weight
        return shares

    def _upper(self, tap, row):
        """The upper half: tokens after the prompt go through the stream's adapter and read what they have read."""
        config, first = self.stack.pdt_configs[self.stack.active], len(row.start)
        inside = config.snc_placement == "after_attention"
        sites = config.instrumented_layers if inside else [*config.instrumented_layers, len(self.stack.layers)]

        def conditioned(change, *arguments):
            def apply(hidden):
                if not row.readings:
                    return hidden
                return torch.cat([hidden[:, :first], change(hidden[0, first:], *arguments)[None]], dim=1)

            return apply

        def between(boundary, hidden):
            if boundary - 1 in config.instrumented_layers:
                hidden = conditioned(self._adapt, config.instrumented_layers.index(boundary - 1), row)(hidden)
            return conditioned(self._read, sites.index(boundary), row)(hidden) if boundary in reading else hidden

        reading = [] if inside else sites
        after = {layer: conditioned(self._read, site, row) for site, layer in enumerate(sites)} if inside else None
        return run_upper(self.stack.base_layer, tap, between, None, after)

    def _adapt(self, hidden_TD, place, row):
        """The bottleneck of the row's stream."""
        adapter = self.stack.pdt_stream_adapters[self.stack.active][place]
        stream = row.stream % self.model.config.num_streams
        activation = ACT2FN[self.stack.pdt_configs[self.stack.active].adapter_activation]
        inner = normed(hidden_TD, adapter.norm) @ adapter.down[stream] + adapter.down_bias[stream]
        return hidden_TD + activation(inner) @ adapter.up[stream]

    def _project(self, reading, site):
        """Keys and values `[W, H, head_dim]` of the notes of a reading."""
        if site not in reading.projected:
            snc = self.stack.snc[site]
            weights = snc.k_proj.weight, snc.v_proj.weight
            reading.projected[site] = tuple((reading.notes @ w.T).unflatten(1, (snc.num_heads, -1)) for w in weights)
        return reading.projected[site]

    def _read(self, hidden_TD, site, row):
        """Shared-notes cross-attention: every token attends to the notes of its own reading, and to the sink."""
        snc, readings = self.stack.snc[site], list(dict.fromkeys(row.readings))
        keys, values = (
            torch.cat(parts) for parts in zip(*(self._project(one, site) for one in readings), strict=True)
        )
        owner = torch.tensor([i for i, one in enumerate(readings) for _ in one.notes])
        reader = torch.tensor([readings.index(one) for one in row.readings])
        queries_TD = normed(hidden_TD, snc.norm)
        queries = (queries_TD @ snc.q_proj.weight.T).unflatten(1, (snc.num_heads, -1))
        scores_THW = torch.einsum("qhd,khd->qhk", queries, keys) / queries.shape[-1] ** 0.5
        scores_THW = scores_THW.masked_fill((owner != reader[:, None])[:, None], float("-inf"))
        sink = snc.sink[:, None].expand(len(hidden_TD), -1, 1)
        weights = torch.cat([scores_THW, sink], dim=-1).softmax(dim=-1)[..., :-1]
        self.attention.append(weights[-1].mean(dim=0)[owner == reader[-1]])
        context = torch.einsum("qhk,khd->qhd", weights, values)
        logit = snc.gate.logit if snc.gate.dynamic is None else snc.gate.logit + snc.gate.dynamic(queries_TD)
        gate = torch.sigmoid(logit) * torch.tensor([[one.scale] for one in row.readings])
        update = (context * gate[..., None]).flatten(1) @ snc.o_proj.weight.T
        return hidden_TD + update * hidden_TD.square().mean(dim=-1, keepdim=True).sqrt()

    def _block_states(self, row):
        """Tap states of the block `[1, L, D]`, the same one position earlier, and those of the whole section."""
        states, begin = self.states(row.text), len(row.start) + len(row.header)
        start = begin + row.block_start
        return states[:, start:], states[:, start - 1 : -1], states[:, begin:]

    def note(self, row):
        """The notes `[K, N]` of the block that the row has just written."""
        states = self._block_states(row)[0]
        if self.model.config.writer_tap == "top":
            # The last token has read what the row reads until the notes of this boundary are there.
            readings = [*row.readings[: len(row.header) + len(row.tokens) - 1], row.reading]
            states = self.last_states(replace(row, readings=readings))[:, -states.shape[1] :]
        length = max(self.choices.block_size, states.shape[1])
        return self.heads.write(states, torch.ones(states.shape[:2], dtype=torch.bool), length)[0]

    def coverage(self, row, plan):
        """Probability of each plan item `[places, N]` that the section states it."""
        if not len(plan):
            return []
        states = self._block_states(row)[2]
        everything = torch.ones(1, 1, states.shape[1], dtype=torch.bool)
        return self.heads.coverage(states, everything, plan[None])[0, 0].sigmoid().tolist()

    def score(self, row, window, coverage):
        """Agreement of the row's block with a window of notes `[W, N]`."""
        states, previous, _ = self._block_states(row)
        tokens, mean = states.shape[1], sum(coverage) / len(coverage) if coverage else 0.0
        logits = self.heads.agreement.token_logits(
            states,
            previous,
            window[None],
            torch.ones(1, tokens, len(window), dtype=torch.bool),
            self.note(row).mean(0).expand(1, tokens, -1),
            torch.full((1, tokens), mean),
        )
        return float(torch.sigmoid(-torch.logsumexp(-logits, dim=-1)))


def normed(hidden, norm):
    """Root-mean-square norm."""
    return hidden / (hidden.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight
