"""Sizes, mixture and loss of a tiny trunk that is pretrained on procedural worlds; its text is in `trunk_corpus`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, Trainer

from .curriculum import check_choice, check_range

IGNORE = -100
FAMILIES = ("gpt_oss", "llama", "qwen3")
"""Model types that a tiny trunk may have."""


@dataclass
class TrunkArguments:
    """Sizes of the tiny trunk and the mixture it is trained on.

    Args:
        model_type (`str`): Family, of `FAMILIES`; one without experts takes an MLP of `intermediate_size`.
        vocab_size (`int`): Tokens of the byte-level BPE.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, num_experts, experts_per_token
            (`int`): Sizes of the trunk.
        max_positions (`int`): Longest row.
        rope_theta (`float`), initializer_range (`float`): As in `GptOssConfig`.
        experts_implementation (`str`): ``"eager"``, ``"batched_mm"`` or ``"grouped_mm"``.
        card_steps (`int`): Optimizer steps on fact cards before text starts.
        card_every, single_every (`int`): In the text stage every n-th pair of micro-batches ends with one of cards, or
            of single sections, instead of a second one of sequential rows.
        rows_sequential, rows_single, rows_cards (`int`): Rows per micro-batch.
        p_foreign (`float`): Share of cards that give cues values of foreign types: only the cue can tell them.
        foreign_from, foreign_until (`int`): After how many text steps a stage of many such facts begins and ends; its
            end must leave steps in which values are of their cue's type, or the trunk states others.
        p_foreign_cards, p_foreign_documents (`float`): Shares of cards and of sequential rows with them in that stage.
        p_hard (`float`): Share of hard documents.
        p_other_streams (`float`): Share of documents with 2, 4, 5 or 6 instead of 3 sections.
        p_permuted (`float`): Share of sequential rows with sections in random order.
        p_cut (`float`): Share of those whose earlier sections stop at a random token, as siblings' texts do when they
            are read while being written.
        repeat_weight (`float`): Loss weight of tokens that repeat a value stated before in the row.
        cue_weight (`float`): Loss weight of the tokens that name a fact type in a section; helps it keep to the plan.
        outline_weight (`float`): Loss weight of the outline's tokens; lets the trunk plan from the bare request.
        eval_documents (`int`): Documents per split in an evaluation by sampling.
        eval_every (`int`): Optimizer steps between evaluations.
    """

    model_type: str = "gpt_oss"
    vocab_size: int = 1216
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 192
    num_experts: int = 4
    experts_per_token: int = 2
    max_positions: int = 1024
    rope_theta: float = 10000.0
    initializer_range: float = 0.04
    experts_implementation: str = "eager"
    card_steps: int = 200
    card_every: int = 4
    single_every: int = 4
    rows_sequential: int = 8
    rows_single: int = 14
    rows_cards: int = 10
    p_foreign: float = 0.1
    foreign_from: int = 0
    foreign_until: int = 0
    p_foreign_cards: float = 0.8
    p_foreign_documents: float = 0.3
    p_hard: float = 0.2
    p_other_streams: float = 0.1
    p_permuted: float = 0.67
    p_cut: float = 0.3
    repeat_weight: float = 5.0
    cue_weight: float = 2.5
    outline_weight: float = 0.3
    eval_documents: int = 48
    eval_every: int = 400

    def __post_init__(self) -> None:
        check_choice("model_type", self.model_type, FAMILIES)
        shares = ("p_foreign", "p_foreign_cards", "p_foreign_documents", "p_hard", "p_other_streams", "p_permuted")
        for name in (*shares, "p_cut"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        check_range("foreign_from", self.foreign_from, 0)
        check_range("foreign_until", self.foreign_until, self.foreign_from)


def trunk_config(arguments: TrunkArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Configuration of the tiny trunk: full attention in every layer, plain rotary positions."""
    experts = {
        "num_local_experts": arguments.num_experts,
        "num_experts_per_tok": arguments.experts_per_token,
        "layer_types": ["full_attention"] * arguments.num_layers,
    }
    return AutoConfig.for_model(
        arguments.model_type,
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        num_key_value_heads=arguments.num_kv_heads,
        head_dim=arguments.head_dim,
        max_position_embeddings=arguments.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": arguments.rope_theta},
        initializer_range=arguments.initializer_range,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **(experts if arguments.model_type == "gpt_oss" else {}),
    )


def weighted_lm_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy of the next token.

    Args:
        logits (`Tensor`): [rows, tokens, vocabulary].
        labels (`Tensor`): [rows, tokens], unshifted, -100 where there is no loss.
        weights (`Tensor`): [rows, tokens], weight of each label.
    """
    targets, weights = labels[:, 1:], weights[:, 1:] * (labels[:, 1:] != IGNORE)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1.0)


class TrunkTrainer(Trainer):
    """`Trainer` with token weights; reports the loss on repeated values apart (`repeat_loss`)."""

    def __init__(self, *args: Any, repeat_weight: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.repeat_weight = repeat_weight
        self.loss_is_scaled_for_ga = False
        self.repeat_losses: list[Tensor] = []

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Weighted loss of one micro-batch."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        labels, weights = inputs["labels"], inputs["weights"]
        loss = weighted_lm_loss(outputs.logits, labels, weights)
        repeated = (weights == self.repeat_weight).float()
        if repeated.any():
            self.repeat_losses.append(weighted_lm_loss(outputs.logits.detach(), labels, repeated))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean loss on repeated values since the last log."""
        if "loss" in logs and self.repeat_losses:
            logs["repeat_loss"] = round(torch.stack(self.repeat_losses).mean().item(), 4)
            self.repeat_losses.clear()
        super().log(logs, start_time)
