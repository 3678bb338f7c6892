"""What every block read: how much attention SNC gave to each note, to the plan and to the sink, and its gate.

Letters: A rows in the trunk's batch, W notes of a window, H heads, T tokens, D trunk width.
"""

import threading
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from .callbacks import ParallelDecodingCallback
from .note_states import NoteStates


class ReadingRecorder(ParallelDecodingCallback):
    """
    Adds a record of every block, withdrawn ones included, to `trace.readings`: who read which note.

    A record holds `prompt`, `stream`, `round` and `attempt` of the reader; `gate`, the mean of the SNC gate with its
    scale; and shares of attention that add up to 1: `sink`, `plan` and, in `notes`, one `{prompt, stream, round,
    weight}` per round of a writer that the reader saw. All are means over the block's tokens, the sites of SNC and
    its heads. With a `retention` that merges rounds, `round` is the newest of them. A block that ran without SNC
    (`logit_blend=0`, a disabled adapter) leaves no record. Attention is computed once more to be read, and costs a
    transfer per trunk call.

    Example:

    ```python
    >>> with ReadingRecorder() as recorder:
    ...     output = model.generate(**inputs, callbacks=[recorder], return_dict_in_generate=True)
    >>> output.trace.readings[-1]["notes"]
    ```
    """

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.is_open = False

    def __enter__(self) -> "ReadingRecorder":
        self.is_open = True
        return self

    def __exit__(self, *error: Any) -> None:
        self.is_open = False
        self._stop_listening()

    def on_plan(self, decoder: Any) -> None:
        """Listens to the sites of SNC."""
        if not self.is_open:
            raise ValueError("a ReadingRecorder listens inside a `with` statement.")
        self._stop_listening()
        self.decoder, self.places, self.sums, self.seen = decoder, {}, {}, []
        self.thread = threading.get_ident()
        for site in decoder.stack.snc:
            self.handles.append(site.register_forward_pre_hook(self._look, with_kwargs=True))

    def on_round_begin(self, decoder: Any, rows_M: torch.Tensor) -> None:
        """Notes which round stands behind every place of the windows just made."""
        request = decoder.request
        # With `logit_blend=0` nothing reads, and no window is made.
        if request is not None:
            versions = decoder.bus.window_rounds(request.sources, request.read_round, request.lag).tolist()
            prompts = (request.sources // decoder.settings.num_streams).tolist()
            self.places = dict(zip(request.rows.tolist(), zip(prompts, versions, strict=True), strict=True))
        for row in rows_M.tolist():
            self.sums[row] = {"tokens": 0, "gate": 0.0, "sink": 0.0, "plan": 0.0, "notes": defaultdict(float)}

    def on_token(self, decoder: Any, rows_M: torch.Tensor, tokens_M: torch.Tensor, scores_MV: torch.Tensor) -> None:
        """Adds what the rows read in this trunk call."""
        if not self.seen:
            return
        gates_A, weights_AW = (torch.stack(parts).mean(dim=0) for parts in zip(*self.seen, strict=True))
        plan, (streams, per_block) = decoder.bus.plan_BPN.shape[1], decoder.bus.notes_BSVKN.shape[1:4:2]
        rounds = (weights_AW.shape[1] - 1 - plan) // (streams * per_block)
        per_note = weights_AW[:, plan:-1].unflatten(1, (streams, rounds, per_block))
        ends = torch.stack([gates_A, weights_AW[:, -1], weights_AW[:, :plan].sum(dim=1)], dim=1).tolist()
        shares = per_note.sum(dim=-1).tolist()
        self.seen = []
        for row in rows_M.tolist():
            sums, index = self.sums[row], self.rows_A.index(row)
            sums["tokens"] += 1
            for name, value in zip(("gate", "sink", "plan"), ends[index], strict=True):
                sums[name] += value
            prompt, versions = self.places[row]
            for stream, (rounds, weights) in enumerate(zip(versions, shares[index], strict=True)):
                for round_number, weight in zip(rounds, weights, strict=True):
                    if weight > 0:
                        sums["notes"][prompt, stream, round_number] += weight

    def on_commit(self, decoder: Any, event: dict[str, Any]) -> None:
        """Records the block."""
        self._record(decoder, event)

    def on_rollback(self, decoder: Any, event: dict[str, Any]) -> None:
        """Records the block."""
        self._record(decoder, event)

    def on_end(self, decoder: Any) -> None:
        """Listens no more."""
        self._stop_listening()

    def _record(self, decoder: Any, event: dict[str, Any]) -> None:
        sums = self.sums[event["prompt"] * decoder.settings.num_streams + event["stream"]]
        tokens = sums["tokens"]
        if tokens:
            place = {name: event[name] for name in ("prompt", "stream", "round", "attempt")}
            notes = [
                {"prompt": prompt, "stream": stream, "round": round_number, "weight": weight / tokens}
                for (prompt, stream, round_number), weight in sorted(sums["notes"].items())
            ]
            shares = {name: sums[name] / tokens for name in ("gate", "sink", "plan")}
            decoder.trace.readings.append({**place, **shares, "notes": notes})

    def _look(self, site: nn.Module, inputs: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
        """Keeps gates `[A]` and weights `[A, W + 1]` of a site at the last token of every row of its own call."""
        hidden_ATD, states, place = inputs[0], kwargs["note_states"], kwargs["site"]
        # Another call may decode with the same model in another thread.
        if threading.get_ident() != self.thread:
            return
        if place == 0:
            self.seen, self.rows_A = [], list(self.decoder.streams.batch_rows)
        mask = states.mask
        if hidden_ATD.shape[1] > 1:
            headers = [len(self.decoder.inputs.headers[row]) for row in self.rows_A]
            rows_A, last_A = torch.arange(len(headers)), torch.tensor(headers)
            hidden_ATD = hidden_ATD[rows_A, last_A][:, None]
            mask = mask[rows_A, last_A] if mask.dim() == 3 else mask
        self.seen.append(read_site(site, hidden_ATD, states, place, mask))

    def _stop_listening(self) -> None:
        while self.handles:
            self.handles.pop().remove()


def read_site(
    site: Any, hidden_A1D: torch.Tensor, states: NoteStates, place: int, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What one site of SNC reads at one token per row.

    Args:
        site (`SharedNotesCrossAttention`): The site.
        hidden_A1D (`torch.Tensor` of shape `[A, 1, D]`): States that it conditions.
        states (`NoteStates`): The windows, one per row.
        place (`int`): Its number among the sites.
        mask (`torch.BoolTensor` of shape `[A, W]` or `[A, 1, W]`): Visible notes.

    Returns:
        `(gates, weights)`: `[A]`, and `[A, W + 1]` with the sink's last; means over the heads.
    """
    queries = site.norm(hidden_A1D)
    weights_AH1W = site.weights(queries, states.keys[place], site.bias(mask))
    scale = states.gate_scale
    gate = site.gate(queries).expand(hidden_A1D.shape[0], 1, -1).mean(dim=(1, 2)) * scale
    return gate.float(), weights_AH1W.mean(dim=(1, 2)).float()
