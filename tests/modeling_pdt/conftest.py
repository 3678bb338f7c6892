"""Tiny random trunks of three families, PDT models on them, and random rollouts."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_pdt import PDTForParallelDecoding, Rollout

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# Wider initial weights than a real model's: every layer, window and note must move the logits measurably.
INITIALIZER_RANGE = 0.1
TRUNK_NAMES = ("gpt_oss", "llama", "qwen3")


def gpt_oss_trunk(**changes) -> GptOssForCausalLM:
    values = {
        **COMMON,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_implementation": "eager",
        "initializer_range": INITIALIZER_RANGE,
    }
    return GptOssForCausalLM(GptOssConfig(**{**values, **changes}))


def llama_trunk(**changes) -> LlamaForCausalLM:
    values = {**COMMON, "num_hidden_layers": 3, "initializer_range": INITIALIZER_RANGE}
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes}))


def qwen3_trunk(**changes) -> Qwen3ForCausalLM:
    values = {
        **COMMON,
        "num_hidden_layers": 5,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
        "initializer_range": INITIALIZER_RANGE,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**values, **changes}))


MAKERS = {"gpt_oss": gpt_oss_trunk, "llama": llama_trunk, "qwen3": qwen3_trunk}


@pytest.fixture
def make_trunk() -> Callable[..., PreTrainedModel]:
    """`make_trunk(name="gpt_oss", **config_changes)`: a tiny random trunk in eval mode."""

    def make(name: str = "gpt_oss", **changes) -> PreTrainedModel:
        return MAKERS[name](**changes).eval()

    return make


@pytest.fixture(params=TRUNK_NAMES)
def trunk(request, make_trunk) -> PreTrainedModel:
    """Each of the three trunks in turn."""
    return make_trunk(request.param)


@pytest.fixture
def randomize() -> Callable[..., PDTForParallelDecoding]:
    """`randomize(model, scale=0.1)`: moves every PDT parameter, as training would; zero starts become visible."""

    def move(model: PDTForParallelDecoding, scale: float = 0.1) -> PDTForParallelDecoding:
        with torch.no_grad():
            for parameter in model.pdt_parameters().values():
                parameter.add_(torch.randn_like(parameter) * scale)
        return model

    return move


@pytest.fixture
def make_model(make_trunk, randomize) -> Callable[..., PDTForParallelDecoding]:
    """`make_model(name="gpt_oss", trained=False, **overrides)`: a tiny PDT model in eval mode."""

    def make(name: str = "gpt_oss", trained: bool = False, **overrides) -> PDTForParallelDecoding:
        overrides = {"notes_dim": 16, "block_size": 4, "adapter_bottleneck": 8, **overrides}
        model = PDTForParallelDecoding.from_trunk(make_trunk(name), **overrides).eval()
        return randomize(model) if trained else model

    return make


@pytest.fixture
def model(make_model) -> PDTForParallelDecoding:
    """A tiny PDT model on GptOss whose parameters have moved."""
    return make_model(trained=True)


@pytest.fixture
def make_batch() -> Callable[..., SimpleNamespace]:
    """`make_batch(rows=3, tokens=20, padding=5)`: ids, mask with `padding` left pads in row 0, and positions."""

    def make(rows: int = 3, tokens: int = 20, padding: int = 5) -> SimpleNamespace:
        ids = torch.randint(2, VOCAB, (rows, tokens))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        ids[0, :padding] = 0
        return SimpleNamespace(ids=ids, mask=mask, positions=(mask.cumsum(-1) - 1).clamp(min=0))

    return make


def random_texts(*shape: int, length: int = 6, shortest: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens and mask of short texts, `[*shape, length]`."""
    mask = torch.arange(length) < torch.randint(shortest, length + 1, shape)[..., None]
    return torch.randint(2, VOCAB, (*shape, length)) * mask, mask


@pytest.fixture
def make_rollout() -> Callable[..., SimpleNamespace]:
    """
    `make_rollout(documents=2, streams=3, block_size=4, lengths=None, items=0, true_notes=False, **rollout_fields)`.

    Every row is a prompt of 4 tokens (the last one is conditioned), a header of 1 to 3 tokens, and a section of
    `lengths[row]` tokens, right-padded. `items` adds that many plan items per document, the last of the first document
    absent; `true_notes` the text of every block's true notes. `inputs` are the keyword arguments of `model.forward`;
    `start` the position of each row's first section token.
    """

    def make(
        documents: int = 2,
        streams: int = 3,
        block_size: int = 4,
        lengths: list[int] | None = None,
        lag: int = 1,
        capacity: int = 16,
        prompt: int = 4,
        items: int = 0,
        true_notes: bool = False,
        **fields,
    ) -> SimpleNamespace:
        rows = documents * streams
        lengths = lengths or [3 * block_size + 2 * (row % 3) for row in range(rows)]
        start = [prompt + 1 + row % 3 for row in range(rows)]
        tokens = max(begin + length for begin, length in zip(start, lengths, strict=True)) + 1
        ids = torch.randint(2, VOCAB, (rows, tokens))
        mask = torch.zeros_like(ids)
        streams_RT, write, read = (torch.full((rows, tokens), -1) for _ in range(3))
        for row, (begin, length) in enumerate(zip(start, lengths, strict=True)):
            end = begin + length
            mask[row, :end] = 1
            streams_RT[row, prompt - 1 : end] = row % streams
            write[row, begin:end] = torch.arange(length) // block_size
            read[row, begin - 1 : end] = torch.arange(length + 1) // block_size
            read[row, prompt - 1 : begin] = 0
        ids = ids * mask
        if items:
            item_ids, item_mask = random_texts(documents, items)
            item_mask[0, -1] = False
            fields.update(item_ids_BPL=item_ids, item_mask_BPL=item_mask)
        if true_notes:
            note_ids, note_mask = random_texts(rows, int(write.max()) + 1)
            fields.update(note_ids_RVL=note_ids, note_mask_RVL=note_mask)
        rollout = Rollout(
            num_streams=streams,
            block_size=block_size,
            capacity=capacity,
            write_round_RT=write,
            read_round_RT=read,
            lag_R1=torch.full((rows, 1), lag),
            **fields,
        )
        inputs = {"input_ids": ids, "attention_mask": mask, "stream_ids": streams_RT, "rollout": rollout}
        labels = ids.masked_fill(write < 0, -100)
        return SimpleNamespace(inputs=inputs, rollout=rollout, labels=labels, start=start, lengths=lengths, ids=ids)

    return make
