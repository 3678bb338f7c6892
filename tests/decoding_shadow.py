"""A decoder over token lists, and a shadow that follows every row of it and computes it again without a cache."""

from types import SimpleNamespace

import torch

from modeling_pdt import Rollout
from modeling_pdt.generation_inputs import merge_generation_config, prepare_inputs
from modeling_pdt.generation_pdt import ParallelDecoder


def decoder_for(model, prompts, headers=None, plan=None, **kwargs):
    """A decoder over token lists, with headers `[row]` and plan vectors given directly."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    seed = kwargs.pop("seed", 0)
    interventions = kwargs.pop("interventions", None)
    config = merge_generation_config(model, None, {"eos_token_id": None, "pad_token_id": 0, **kwargs})
    inputs, settings = prepare_inputs(model, config, ids, mask, seed=seed, interventions=interventions)
    if headers is not None:
        inputs.headers = headers * len(prompts)
    if plan is not None:
        inputs.plan_BPN, inputs.plan_mask_BP = plan
        inputs.num_items = plan[0].shape[1]
    return ParallelDecoder(model, inputs, settings)


def whole_rows(decoder, **plan):
    """
    Arguments of one forward with a `Rollout` over the rows that a decoder has written, in blocks of `block_size`, and
    where their sections start; `plan` are further fields of the `Rollout`.
    """
    streams, settings = decoder.streams, decoder.settings
    block, num_streams = settings.block_size, settings.num_streams
    rows = [(streams.prompts[row // num_streams], one.header, one.tokens) for row, one in enumerate(streams.sections)]
    longest = max(len(p) + len(h) + len(s) for p, h, s in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    stream, write, read = (torch.full_like(ids, -1) for _ in range(3))
    start = []
    for row, (prompt, header, section) in enumerate(rows):
        begin = len(prompt) + len(header)
        end = begin + len(section)
        ids[row, :end] = torch.tensor(prompt + header + section)
        mask[row, :end] = 1
        stream[row, len(prompt) : end] = row % num_streams
        write[row, begin:end] = torch.arange(len(section)) // block
        read[row, len(prompt) : begin] = 0
        read[row, begin:end] = (torch.arange(len(section)) + 1) // block
        start.append(begin)
    lag = torch.full((len(rows), 1), settings.bus_lag)
    plan["plan_on_bus"] = decoder.model.config.plan_on_bus
    rollout = Rollout(num_streams, block, settings.bus_capacity, write, read, lag, **plan)
    return {"input_ids": ids, "attention_mask": mask, "stream_ids": stream, "rollout": rollout}, start


class Shadow:
    """Follows every row of a decoder: the tokens its cache holds, the window each of them read, and the logits."""

    def __init__(self, decoder):
        self.decoder, self.events = decoder, []
        self.windows, self.rows = [], [[] for _ in decoder.streams.sections]
        self.logits = [{} for _ in self.rows]
        streams, stack = decoder.streams, decoder.stack
        self.upper, self.project, self.choose = stack.upper, stack.project_notes, decoder._choose
        self.rollback = streams.rollback
        self.tokens = 0
        decoder._choose = self._on_choose
        streams.rollback = self._on_rollback

    def run(self):
        stack = self.decoder.stack
        lower, upper, project = stack.lower, stack.upper, stack.project_notes

        def on_lower(**inputs):
            self._consume(inputs["input_ids"], inputs["attention_mask"])
            return lower(**inputs)

        def on_project(notes, mask, scale):
            self.windows.append(dict(zip(self.decoder.streams.batch_rows, notes, strict=True)))
            return project(notes, mask, scale)

        def on_upper(tap, states=None, stream_ids=None, collect=None):
            self._record(states, stream_ids)
            return upper(tap, states, stream_ids, collect)

        stack.lower, stack.upper, stack.project_notes = on_lower, on_upper, on_project
        try:
            return self.decoder.run()
        finally:
            del stack.lower, stack.upper, stack.project_notes

    def _consume(self, ids, mask):
        """Notes the tokens whose lower half runs; a prefilled prompt belongs to all of its rows."""
        streams, self.tokens = self.decoder.streams, ids.shape[1]
        prefill = len(ids) < len(streams.batch_rows)
        for place, row in enumerate(streams.batch_rows):
            source = row // streams.num_streams if prefill else place
            for token, real in zip(ids[source].tolist(), mask[source, -self.tokens :].tolist(), strict=True):
                self.rows[row].append(SimpleNamespace(token=token, real=bool(real), window=None, mask=None, stream=-1))

    def _record(self, states, stream_ids):
        """What the newest tokens of every row read in their upper half."""
        if states is None:
            return
        for source, row in enumerate(self.decoder.streams.batch_rows):
            for place, entry in enumerate(self.rows[row][-self.tokens :]):
                entry.window = len(self.windows) - 1
                entry.mask = states.mask[source] if states.mask.dim() == 2 else states.mask[source, place]
                entry.stream = int(stream_ids[source, place])

    def _on_rollback(self, counts):
        cache = self.decoder.streams.cache
        kept = (counts[self.decoder.streams.batch_A] == 0).nonzero().squeeze(1)
        before = [(layer._keys[kept, :, layer.start : layer.end].clone(), layer.end) for layer in cache.layers]
        mask = self.decoder.streams.mask[kept].clone()
        self.rollback(counts)
        for layer, (keys, end) in zip(cache.layers, before, strict=True):
            assert layer.end == end
            assert torch.equal(layer._keys[kept, :, layer.start : layer.end], keys)
        assert torch.equal(self.decoder.streams.mask[kept], mask)
        for row, count in enumerate(counts.tolist()):
            if count:
                self.events.append((row, count))
                del self.rows[row][-count:]

    def _on_choose(self, rows, logits):
        for row, values in zip(rows.tolist(), logits, strict=True):
            self.logits[row][int(self.decoder.streams.fed_R[row])] = values.clone()
        return self.choose(rows, logits)

    def largest_difference(self, row, gate_scale=1.0):
        """Between the logits that the row was continued with and one forward over its tokens without a cache."""
        model, streams = self.decoder.model, self.decoder.streams
        entries = [entry for entry in self.rows[row] if entry.real]
        section = streams.sections[row]
        expected = streams.prompts[row // streams.num_streams] + section.header + section.tokens
        assert [entry.token for entry in entries] == expected[: len(entries)]
        assert len(entries) >= len(expected) - 1
        used = sorted({entry.window for entry in entries if entry.window is not None})
        offset, width = {}, 0
        for window in used:
            offset[window] = width
            width += len(self.windows[window][row])
        mask = torch.zeros(1, len(entries), width, dtype=torch.bool)
        for place, entry in enumerate(entries):
            if entry.window is not None:
                start = offset[entry.window]
                mask[0, place, start : start + len(entry.mask)] = entry.mask
        notes = torch.cat([self.windows[window][row] for window in used])[None]
        ids = torch.tensor([[entry.token for entry in entries]])
        fresh = model(
            ids,
            stream_ids=torch.tensor([[entry.stream for entry in entries]]),
            note_states=model.project_notes(notes, mask, gate_scale),
        ).logits[0]
        start = len(expected) - len(section.tokens) - 1
        chosen = range(len(section.tokens))
        return max(float((self.logits[row][place] - fresh[start + place]).abs().max()) for place in chosen)
