"""A tiny model with the original's modules and equations, of every generation, that tests make checkpoints from."""

import math

import torch
from torch import nn

H, D, R, B, S, A, HEADS = 16, 8, 24, 10, 3, 4, 2
SLOTS = 16


class NotesHead(nn.Module):
    """A gated projection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.projector = nn.Linear(H, D)

    def forward(self, hidden):
        return torch.sigmoid(self.gate) * self.projector(hidden)


class Coverage(nn.Module):
    """The release's: one attention without heads, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)
        self.proj = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 1))

    def forward(self, hidden, items, mask):
        scores = torch.einsum("bph,bth->bpt", self.query(items), self.key(hidden)) / math.sqrt(H)
        context = torch.einsum("bpt,bth->bph", scores.softmax(-1), self.value(hidden))
        return torch.where(mask, self.proj(context)[..., 0], torch.zeros(()).to(hidden))


class MultiHeadCoverage(nn.Module):
    """Upgrade 03: heads, window means as further keys, a learned temperature."""

    def __init__(self, heads: int = 8, window: int = 32) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(H, H) for _ in range(4))
        self.score = nn.Linear(H, 1)
        self.log_temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, hidden, items, mask):
        sums = [part.sum(1) / self.window for part in hidden.split(self.window, dim=1)]
        sources = torch.cat([hidden, torch.stack(sums, dim=1)], dim=1)
        split = lambda x: x.reshape(*x.shape[:2], self.heads, -1)  # noqa: E731
        query, key, value = split(self.q_proj(items)), split(self.k_proj(sources)), split(self.v_proj(sources))
        scores = torch.einsum("bphd,bthd->bhpt", query, key) / self.log_temperature.exp()
        context = torch.einsum("bhpt,bthd->bphd", scores.softmax(-1), value).reshape(*items.shape)
        return torch.where(mask, self.score(self.o_proj(context))[..., 0], torch.zeros(()).to(hidden))


class Original(nn.Module):
    """
    Modules under the release's names.

    Args:
        slots (`bool`): A planner with 16 slots.
        multi_head (`bool`): Coverage of upgrade 03.
        layer_norm (`bool`): In adapters; upgrade 05 has none.
        gates (`int`): Of the attention; more than 1 is upgrade 01.
        plan_note (`bool`): With the plan's projection and the notes' query.
    """

    def __init__(self, slots=False, multi_head=False, layer_norm=True, gates=1, plan_note=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear = lambda rows, **options: nn.ModuleDict({"projector": nn.Linear(H, rows, **options)})  # noqa: E731
        self.slots = slots
        streams = nn.ModuleDict({f"stream_{k}": self.adapter(layer_norm) for k in range(S)})
        self.stream_adapters = nn.ModuleDict({"adapters": streams})
        projections = {"q_proj": H, "k_proj": D, "v_proj": D, "o_proj": H}
        self.cross_attention = nn.ModuleDict({name: nn.Linear(columns, H) for name, columns in projections.items()})
        self.cross_attention.gate = nn.Parameter(torch.full((gates,), -4.0))
        self.planner_head = linear(SLOTS * B if slots else R, bias=False)
        self.notes_head, self.speculation_head = NotesHead(), linear(D)
        self.agreement_head = nn.ModuleDict({"scorer": nn.Linear(H, 1)})
        self.coverage_head = MultiHeadCoverage() if multi_head else Coverage()
        self.stream_classifier = nn.ModuleDict({"proj": nn.Linear(H, H), "classifier": nn.Linear(H, S)})
        self.plan_embedding = nn.Embedding(B, H)
        if plan_note:
            self.plan_notes_proj = nn.Linear(H, D)
            self.notes_summary_query = nn.Parameter(torch.randn(1, D))
        with torch.no_grad():
            self.notes_head.gate.fill_(0.4)

    @staticmethod
    def adapter(layer_norm):
        """One stream's."""
        parts = {"down": nn.Linear(H, A), "up": nn.Linear(A, H)}
        return nn.ModuleDict(parts | ({"layer_norm": nn.LayerNorm(H)} if layer_norm else {}))

    def forward(self, hidden, attention_mask, plan_ids, plan_mask):
        """Outputs by the names of `OriginalOutputs`."""
        mean = torch.stack([row[keep].mean(0) for row, keep in zip(hidden, attention_mask.bool(), strict=True)])
        project = self.planner_head["projector"]
        classifier = self.stream_classifier
        return {
            "planner_logits": project(mean).reshape(len(hidden), SLOTS, B) if self.slots else project(hidden),
            "notes": self.notes_head(hidden),
            "speculative_notes": self.speculation_head["projector"](hidden),
            "agreement": torch.sigmoid(self.agreement_head["scorer"](hidden))[..., 0],
            "stream_logits": classifier["classifier"](torch.tanh(classifier["proj"](hidden.mean(1)))),
            "coverage_logits": self.coverage_head(hidden, self.plan_embedding(plan_ids), plan_mask),
        }

    def plan_note(self, plan_ids):
        """Of unpadded plans: the mean of projected items at length 1."""
        pooled = self.plan_notes_proj(self.plan_embedding(plan_ids)).mean(1)
        return pooled / pooled.norm(dim=-1, keepdim=True)


GENERATIONS = {
    "release": {},
    "per-head gate (upgrade 01)": {"gates": HEADS},
    "multi-head coverage (upgrade 03)": {"multi_head": True},
    "adapters without layer norm (upgrade 05)": {"layer_norm": False},
    "planner with slots": {"slots": True},
    "plan projection (plan_notes_proj)": {"plan_note": True},
    "head": {"slots": True, "multi_head": True, "layer_norm": False, "gates": HEADS, "plan_note": True},
}
# Parts that a stage of the original's schedule had frozen, which its checkpoints therefore lack.
FROZEN = {
    0: (
        "stream_adapters",
        "cross_attention",
        "speculation_head",
        "agreement_head",
        "coverage_head",
        "stream_classifier",
    ),
    1: ("speculation_head", "agreement_head", "coverage_head"),
    2: ("agreement_head", "coverage_head"),
    3: (),
}


def layer_state(layers=(2, 3)) -> dict[str, torch.Tensor]:
    """Parameters inside the trunk's layers, as no published run has them."""
    state = {}
    for index in layers:
        prefix = f"trunk_adapter.model.model.layers.{index}."
        for name, tensor in Original().state_dict().items():
            if name.startswith("stream_adapters"):
                state[f"{prefix}stream_adapter.adapters.{name.removeprefix('stream_adapters.')}"] = tensor
            elif name.startswith("cross_attention"):
                state[f"{prefix}snc_residual.{name}"] = tensor
        state |= {f"{prefix}stream_adapter_gate": torch.tensor(0.0), f"{prefix}notes_gate": torch.tensor(-4.0)}
    return state
