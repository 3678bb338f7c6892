"""The original's heads, computed by the equations of its release (December 2025) and of its later generations.

They read the trunk's last hidden state after the final norm. Letters: B rows, T tokens, H trunk width, D note width,
P plan items.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, normalize, pad
from transformers.utils import ModelOutput

from ..telemetry import read_json
from .names import recognise

HEADS_FILE, CHOICES_FILE = "original_heads.safetensors", "original_heads.json"


@dataclass(frozen=True)
class HeadChoices:
    """
    What the shapes of the tensors do not tell; the defaults are the original's.

    Args:
        planner_slots (`int`, *optional*): Plan items that the planner predicts from the whole prompt; 0 = one
            distribution over the vocabulary per token, as in the release. Missing = 16 if the planner has 16 rows per
            plan bucket, else 0.
        coverage_heads (`int`, *optional*, defaults to 8), coverage_window (`int`, *optional*, defaults to 32): Heads,
            and tokens averaged into one further key (0 = none), of multi-head coverage.
        teacher_scale (`float`, *optional*, defaults to 1.0): Factor on speculative notes.
    """

    planner_slots: int | None = field(
        default=None, metadata={"help": "Plan items of the planner; 0 = per token; missing = told by its rows."}
    )
    coverage_heads: int = field(default=8, metadata={"help": "Heads of multi-head coverage."})
    coverage_window: int = field(default=32, metadata={"help": "Tokens per further key of multi-head coverage."})
    teacher_scale: float = field(default=1.0, metadata={"help": "Factor on speculative notes."})

    def settled(self, sizes: Mapping[str, int], forms: Mapping[str, str]) -> "HeadChoices":
        """
        These choices, checked against the sizes of a checkpoint, none of them missing.

        Raises:
            ValueError: Naming the choice, its value and what is allowed.
        """
        rows, buckets, slots = sizes.get("R"), sizes.get("B"), self.planner_slots
        if slots is None and rows is not None and buckets is None:
            raise ValueError(
                "planner_slots is missing, and without plan_embedding the planner's rows do not tell it: give 16 for "
                "a planner with slots, 0 for the release's."
            )
        if slots is None:
            slots = 16 if rows is not None and rows == 16 * buckets else 0
        if slots < 0 or (slots and rows is not None and rows % slots):
            raise ValueError(f"planner_slots={slots}, allowed: 0, or a divisor of the planner's {rows} rows.")
        multi = forms.get("coverage_head") == "multi_head"
        if self.coverage_heads < 1 or (multi and sizes["H"] % self.coverage_heads):
            raise ValueError(f"coverage_heads={self.coverage_heads}, allowed: a divisor of width {sizes.get('H')}.")
        if self.coverage_window < 0:
            raise ValueError(f"coverage_window={self.coverage_window}, allowed: 0 or more.")
        return HeadChoices(slots, self.coverage_heads, self.coverage_window, self.teacher_scale)


@dataclass
class OriginalOutputs(ModelOutput):
    """
    What the original's heads say; `None` for a head that the checkpoint does not hold.

    Args:
        planner_logits (`torch.Tensor` of shape `[B, T, vocabulary]`, or `[B, slots, buckets]`): Of the planner.
        notes (`torch.Tensor` of shape `[B, T, D]`): Of the notes head.
        speculative_notes (`torch.Tensor` of shape `[B, T, D]`): Of the speculation head.
        agreement (`torch.Tensor` of shape `[B, T]`): In (0, 1).
        stream_logits (`torch.Tensor` of shape `[B, streams]`): Of the stream classifier.
        coverage_logits (`torch.Tensor` of shape `[B, P]`): 0 where there is no plan item.
    """

    planner_logits: torch.Tensor | None = None
    notes: torch.Tensor | None = None
    speculative_notes: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    stream_logits: torch.Tensor | None = None
    coverage_logits: torch.Tensor | None = None


class OriginalHeads:
    """
    The heads of a checkpoint, for reproducing what the original computed; nothing here learns.

    Args:
        state (`Mapping[str, torch.Tensor]`): Tensors of the heads under the names of the release.
        choices ([`HeadChoices`], *optional*): What the shapes do not tell.

    Example:

    ```python
    >>> heads = OriginalHeads.from_pretrained("build/original")
    >>> hidden = trunk(**inputs, output_hidden_states=True).hidden_states[-1]
    >>> heads(hidden, inputs["attention_mask"]).speculative_notes
    ```
    """

    def __init__(self, state: Mapping[str, torch.Tensor], choices: HeadChoices | None = None) -> None:
        contents = recognise(state)
        self.state, self.forms = dict(state), contents.forms
        self.choices = (choices or HeadChoices()).settled(contents.sizes, contents.forms)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "OriginalHeads":
        """Heads that `recipes/convert_checkpoint.py` wrote into a folder."""
        choices = HeadChoices(**read_json(Path(folder) / CHOICES_FILE))
        return cls(load_file(Path(folder) / HEADS_FILE), choices)

    def to(self, *arguments, **keywords) -> "OriginalHeads":
        """These heads with their tensors elsewhere or of another type, as `torch.Tensor.to` takes it."""
        state = {name: tensor.to(*arguments, **keywords) for name, tensor in self.state.items()}
        return OriginalHeads(state, HeadChoices(**asdict(self.choices)))

    def __call__(
        self,
        hidden_BTH: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        plan_ids: torch.Tensor | None = None,
        plan_mask: torch.Tensor | None = None,
    ) -> OriginalOutputs:
        """
        All heads that are there. Only a planner with slots looks at the attention mask, as in the original.

        Args:
            hidden_BTH (`torch.Tensor` of shape `[B, T, H]`): The trunk's last state, after its final norm.
            attention_mask (`torch.Tensor` of shape `[B, T]`, *optional*): 1 for real tokens.
            plan_ids (`torch.LongTensor` of shape `[B, P]`, *optional*): Buckets of plan items; needed for coverage.
            plan_mask (`torch.Tensor` of shape `[B, P]`, *optional*): Real items; default: buckets that are not 0.
        """
        outputs = OriginalOutputs()
        if "planner_head" in self.forms:
            outputs.planner_logits = self._plan(hidden_BTH, attention_mask)
        if "notes_head" in self.forms:
            outputs.notes = self._notes(hidden_BTH)
        if "speculation_head" in self.forms:
            speculative = self._linear("speculation_head.projector", hidden_BTH)
            outputs.speculative_notes = speculative * self.choices.teacher_scale
        if "agreement_head" in self.forms:
            outputs.agreement = self._linear("agreement_head.scorer", hidden_BTH).sigmoid().squeeze(-1)
        if "stream_classifier" in self.forms:
            outputs.stream_logits = self._classify(hidden_BTH)
        if plan_ids is not None and {"coverage_head", "plan_embedding"} <= set(self.forms):
            items = self.state["plan_embedding.weight"][plan_ids]
            mask = (plan_ids if plan_mask is None else plan_mask) != 0
            outputs.coverage_logits = self._coverage(hidden_BTH, items, mask)
        return outputs

    def plan_note(self, plan_ids: torch.Tensor) -> torch.Tensor:
        """
        The plan as one note, which some generations put on the bus first: the mean of projected items, of length 1.

        Args:
            plan_ids (`torch.LongTensor` of shape `[B, P]`): Buckets of plan items, 0 for none.

        Returns:
            `torch.Tensor` of shape `[B, D]`.
        """
        for part in ("plan_embedding", "plan_notes_proj"):
            if part not in self.forms:
                raise ValueError(f"this checkpoint holds no {part}; plan_note needs it.")
        items = self._linear("plan_notes_proj", self.state["plan_embedding.weight"][plan_ids])
        weights = (plan_ids != 0).to(items.dtype).unsqueeze(-1)
        return normalize((items * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1), dim=-1)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def _plan(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        slots = self.choices.planner_slots
        if not slots:
            return self._linear("planner_head.projector", hidden)
        weights = torch.ones_like(hidden[..., :1]) if mask is None else mask.to(hidden.dtype).unsqueeze(-1)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return self._linear("planner_head.projector", pooled).unflatten(-1, (slots, -1))

    def _notes(self, hidden: torch.Tensor) -> torch.Tensor:
        notes = self._linear("notes_head.projector", hidden)
        gate = self.state.get("notes_head.gate")
        return notes if gate is None else gate.sigmoid() * notes

    def _classify(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self._linear("stream_classifier.proj", hidden.mean(dim=1)).tanh()
        return self._linear("stream_classifier.classifier", inner)

    def _coverage(self, hidden: torch.Tensor, items: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.forms["coverage_head"] == "single_head":
            query, key, value = (
                self._linear(f"coverage_head.{name}", x)
                for name, x in (("query", items), ("key", hidden), ("value", hidden))
            )
            weights = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(dim=-1)
            logits = self._linear("coverage_head.proj.2", self._linear("coverage_head.proj.0", weights @ value).relu())
        else:
            read = self._attend_in_heads(items, self._with_windows(hidden))
            logits = self._linear("coverage_head.score", self._linear("coverage_head.o_proj", read))
        return logits.squeeze(-1).masked_fill(~mask, 0.0)

    def _with_windows(self, hidden: torch.Tensor) -> torch.Tensor:
        """The tokens, then the mean of every window; the last one is filled up with zeros, which thin its mean."""
        window = self.choices.coverage_window
        if not window:
            return hidden
        filled = pad(hidden, (0, 0, 0, -hidden.shape[1] % window))
        return torch.cat([hidden, filled.unflatten(1, (-1, window)).mean(dim=2)], dim=1)

    def _attend_in_heads(self, items: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            self._linear(f"coverage_head.{name}", x).unflatten(-1, (self.choices.coverage_heads, -1)).transpose(1, 2)
            for name, x in (("q_proj", items), ("k_proj", sources), ("v_proj", sources))
        )
        temperature = self.state.get("coverage_head.log_temperature")
        scale = query.shape[-1] ** 0.5 if temperature is None else temperature.exp()
        weights = (query @ key.transpose(2, 3) / scale).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2)


def original_plan_bucket(text: str, num_buckets: int, salt: str = "parallel-decoder-v1") -> int:
    """
    The original's bucket of a plan item: SHA-256 of salt and text modulo the buckets, 1 in place of 0, 0 for no text.

    Not ours ([`modeling_pdt.plan.plan_bucket`]): rows of the two plan embeddings stand for other items. Its later
    generation hashes `stream::text`.
    """
    text = text.strip().lower()
    if not text:
        return 0
    return int(hashlib.sha256(f"{salt}::{text}".encode()).hexdigest(), 16) % num_buckets or 1
