"""Random decoding calls for the comparison of `generate` with the reference decoder, and the models that make them."""

from dataclasses import asdict, dataclass, field, replace
from functools import cache

import torch
from hypothesis import strategies as st

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.interventions import (
    Ablate,
    Freeze,
    GateZero,
    NormScramble,
    RandomGate,
    SelfOnly,
    Shuffle,
    Stale,
    Swap,
    ZeroNotes,
)
from tests.decoding_reference import Choices, ReferenceDecoder
from tests.modeling_pdt.conftest import MAKERS

# Trunk and adapter options of every model; the sliding windows of the first and the last hold 8 tokens.
MODELS = {
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss_after_attention": ("gpt_oss", {"snc_placement": "after_attention", "gate_mode": "dynamic"}),
    "llama": ("llama", {"notes_per_block": 2, "gate_mode": "per_head"}),
    "qwen3": ("qwen3", {"num_streams": 2}),
    "gpt_oss_top": ("gpt_oss", {"writer_tap": "top"}),
    "llama_top": ("llama", {"writer_tap": "top", "snc_placement": "after_attention"}),
}
MID = ("gpt_oss", "gpt_oss_after_attention", "llama", "qwen3")
TOP = ("gpt_oss_top", "llama_top")

INTERVENTIONS = {
    "ablate": Ablate(),
    "ablate_plan": Ablate(plan=True),
    "zero_notes": ZeroNotes(),
    "gate_zero": GateZero(),
    "swap": Swap(),
    "stale": Stale(2),
    "freeze": Freeze(1),
    "shuffle": Shuffle(3),
    "norm_scramble": NormScramble(5),
    "self_only": SelfOnly(),
    "random_gate": RandomGate(0.3, seed=2),
}


class Numbers:
    """A tokenizer of texts such as `"5 17 8"`."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}


@cache
def fuzz_model(name):
    """A model whose parameters have moved, whose notes change tokens, and whose agreement is anywhere in [0, 1]."""
    trunk, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        options = {"notes_dim": 16, "block_size": 4, "adapter_bottleneck": 8, "gate_init": 2.0, **options}
        model = PDTForParallelDecoding.from_trunk(MAKERS[trunk]().eval(), **options).eval()
        with torch.no_grad():
            for parameter in model.pdt_parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for site in model.stack.snc:
                site.k_proj.weight.mul_(4)
                site.o_proj.weight.mul_(2)
            model.stack.heads.agreement.score.weight.mul_(8)
            model.stack.heads.agreement.score.bias.fill_(1.5)
    model.config._adapter_config.trained_parts = ["agreement", "coverage"]
    return model


@dataclass
class Case:
    """
    One call: see [`ReferenceDecoder`]. `items` are `(text, stream)` by prompt, `padding` is left of each prompt,
    `interventions` are names with the streams they are for.
    """

    model: str
    choices: Choices
    prompts: list[list[int]]
    padding: list[int]
    headers: list[list[str]]
    items: list[list[tuple[str, int | None]]] = field(default_factory=list)
    seeds: int = 0
    interventions: list[tuple[str, tuple[int, ...] | None]] = field(default_factory=list)

    def seed_notes(self):
        generator = torch.Generator().manual_seed(self.seeds)
        return torch.randn(self.seeds, 16, generator=generator) if self.seeds else None

    def made_interventions(self):
        chosen = [(INTERVENTIONS[name], streams) for name, streams in self.interventions]
        return [one if streams is None else one.on(*streams) for one, streams in chosen]

    def decode(self, **further):
        """The output of `generate`."""
        width = max(len(prompt) + pad for prompt, pad in zip(self.prompts, self.padding, strict=True))
        ids = torch.full((len(self.prompts), width), 96)
        mask = torch.zeros_like(ids)
        for index, (prompt, pad) in enumerate(zip(self.prompts, self.padding, strict=True)):
            ids[index, pad : pad + len(prompt)] = torch.tensor(prompt)
            mask[index, pad : pad + len(prompt)] = 1
        items = [[{"text": text, "stream": stream} for text, stream in row] for row in self.items]
        return fuzz_model(self.model).generate(
            ids,
            attention_mask=mask,
            tokenizer=Numbers(),
            stream_prefixes=self.headers,
            plan_texts=items or None,
            seed_notes=self.seed_notes(),
            interventions=self.made_interventions(),
            pad_token_id=0,
            **({"top_k": 0} if self.choices.do_sample else {}),
            return_dict_in_generate=True,
            **{**asdict(self.choices), **further},
        )

    def sections(self):
        """The tokens of every section that `generate` writes."""
        return [result.token_ids for rows in self.decode().streams for result in rows]

    def without_notes(self):
        """The same call in which nobody reads anything."""
        return replace(self, interventions=[("ablate_plan", None)])

    @torch.no_grad()
    def reference(self):
        """The reference decoder after its run."""
        headers = [[int(word) for word in text.split()] for row in self.headers for text in row]
        items = [[([int(word) for word in text.split()], stream) for text, stream in row] for row in self.items]
        model = fuzz_model(self.model)
        further = items, self.seed_notes(), self.made_interventions()
        decoder = ReferenceDecoder(model, self.choices, self.prompts, headers, *further)
        decoder.run()
        return decoder


tokens = st.integers(2, 95)


def texts(shortest, longest):
    """Texts of tokens."""
    return st.lists(tokens, min_size=shortest, max_size=longest).map(lambda ids: " ".join(map(str, ids)))


@st.composite
def cadences(draw, streams, horizon):
    """Groups of options that say when a block ends."""
    interval = st.one_of(st.integers(1, horizon), st.sampled_from([0.0, 0.4, 1.0]))
    mode = draw(st.sampled_from(["deterministic", "stochastic", "adaptive"]))
    values = {"mode": mode, "interval": draw(st.lists(interval, min_size=streams, max_size=streams))}
    values |= {"interval_min": min(2, horizon), "interval_max": horizon, "max_interval": draw(st.integers(1, horizon))}
    if mode == "adaptive":
        values |= {"age_boost": draw(st.sampled_from([0.0, 0.5])), "multiplier_max": draw(st.sampled_from([2.0, 4.0]))}
    return values


@st.composite
def gates(draw):
    """The choices that decide about blocks, and what follows from the decisions."""
    threshold = draw(st.one_of(st.sampled_from([None, 0.5, 0.999]), st.floats(0.05, 0.95), st.floats(0.4, 0.99)))
    values = {
        "agreement_threshold": threshold,
        "max_retries": draw(st.sampled_from([0, 1, 1, 2, 2, 3])),
        "retry_policy": draw(st.sampled_from(["refresh", "refresh", "stale"])),
        "commit_policy": draw(st.sampled_from(["stream", "stream", "round", "stall", "stall"])),
        "gate_scale": draw(st.sampled_from([1.0, 1.0, 2.0, 2.0, 0.5, 0.0])),
        "logit_blend": draw(st.sampled_from([1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0])),
    }
    if threshold is not None and values["gate_scale"] >= 0.1 and draw(st.booleans()):
        values["gate_annealing"] = {"decay": 0.4, "cooldown": draw(st.integers(0, 2)), "recovery": 0.3}
        if draw(st.booleans()):
            values["flicker_guard"] = {"window": 2, "max_std": 0.1, "clamp": draw(st.sampled_from([0.0, 4.0, None]))}
    return values


@st.composite
def buses(draw, streams):
    """The choices of who reads what."""
    retention = draw(st.sampled_from(["fifo", "fifo", "scored", "compressed", "hybrid"]))
    least = {"fifo": 1, "scored": 2, "compressed": 2, "hybrid": 3}[retention]
    stream = st.integers(0, streams - 1)
    edges = st.lists(st.tuples(stream, stream).filter(lambda edge: edge[0] != edge[1]), max_size=4)
    return {
        "bus_lag": draw(st.sampled_from([1, 1, 2, 3])),
        "bus_capacity": draw(st.integers(least, least + 3)),
        "retention": retention,
        "topology": draw(st.one_of(st.none(), st.none(), edges)),
        "self_notes": draw(st.booleans()),
        "self_only_rounds": draw(st.sampled_from([0, 0, 0, 0, 1, 2])),
    }


@st.composite
def interventions(draw, prompts, streams):
    """Up to two of them, for all streams or for some."""
    names = [name for name in INTERVENTIONS if prompts > 1 or name != "swap"]
    some = st.lists(st.integers(0, streams - 1), min_size=1, max_size=2, unique=True).map(tuple)
    chosen = st.lists(st.tuples(st.sampled_from(names), st.one_of(st.none(), some)), min_size=1, max_size=2)
    return draw(st.one_of(st.just([]), st.just([]), chosen))


@st.composite
def cases(draw, longest=14, models=MID):
    """Calls with everything that changes tokens; `longest` limits the sections, `models` are names of [`MODELS`]."""
    streams, prompts = draw(st.sampled_from([2, 2, 3, 3, 4, 1])), draw(st.sampled_from([1, 1, 2, 2, 3]))
    block = draw(st.sampled_from([2, 3, 4, 1, 5]))
    horizon = draw(st.integers(block, 8))
    choices = Choices(
        num_streams=streams,
        max_new_tokens=draw(st.one_of(st.integers(1, longest), st.integers(longest * 2 // 3, longest))),
        block_size=block,
        commit_horizon=horizon,
        cadence=draw(st.one_of(st.none(), st.none(), cadences(streams, horizon))),
        eos_token_id=draw(st.one_of(st.none(), st.lists(tokens, min_size=3, max_size=12, unique=True))),
        do_sample=draw(st.booleans()),
        retry_temperature=draw(st.sampled_from([0.5, 2.0])),
        repetition_penalty=draw(st.sampled_from([None, None, 1.5])),
        plan=draw(st.sampled_from([None, None, "planner"])),
        seed=draw(st.integers(0, 3)),
        **draw(gates()),
        **draw(buses(streams)),
    )
    items = []
    if choices.plan is None and draw(st.booleans()):
        item = st.tuples(texts(1, 5), st.one_of(st.none(), st.integers(0, streams - 1)))
        items = [draw(st.one_of(st.lists(item, min_size=2, max_size=3), st.just([]))) for _ in range(prompts)]
    case = Case(
        model=draw(st.sampled_from(models)),
        choices=choices,
        prompts=[draw(st.lists(tokens, min_size=1, max_size=12)) for _ in range(prompts)],
        padding=[draw(st.integers(0, 4)) for _ in range(prompts)],
        headers=[[draw(texts(0, 4)) for _ in range(streams)] for _ in range(prompts)],
        items=items if any(items) else [],
        seeds=draw(st.integers(0, 2)),
        interventions=draw(interventions(prompts, streams)),
    )
    if choices.retention in ("scored", "hybrid"):
        choices.retention_score = draw(st.sampled_from(["novelty", "attention"]))
    if case.items and choices.gate_scale > 0 and draw(st.booleans()):
        choices.flicker_guard = {
            "window": 2,
            "max_std": 0.1,
            "max_switches": 0,
            "clamp": draw(st.sampled_from([0.0, 4.0])),
        }
    return case
