"""Scorers that say whether two texts about one thing contradict each other: plug-ins of the measure `nli_violation`.

A scorer is any callable of the form of [`~trainer_pdt.losses.NLIScorer`]. Two come with the package: the exact one of
procedural worlds, and any sequence classification model of `transformers` with a contradiction label.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data.worlds_lexicon import CUES
from .data.worlds_parser import parse_section
from .losses import NLIScorer

logger = logging.getLogger(__name__)

WORLDS = "worlds"
"""Name of [`score_worlds`]; a folder of that name is `./worlds`."""


def load_nli_scorer(name: str, **kwargs: Any) -> NLIScorer:
    """
    The scorer of a name.

    Args:
        name (`str`): `"worlds"`, or folder or Hub id of a sequence classification model.
        kwargs: For the model's `from_pretrained`, for example `dtype` or `device_map`; none with `"worlds"`.

    Raises:
        `ValueError`: The model has no label called "contradiction", or lacks weights of its classifier.
    """
    if name == WORLDS:
        if kwargs:
            raise ValueError(f"nli_scorer={name!r} takes no {sorted(kwargs)}: it is no model, allowed: no options.")
        return score_worlds
    label_columns(AutoConfig.from_pretrained(name).id2label, name)
    model, loading = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **kwargs)
    if loading["missing_keys"]:
        raise ValueError(
            f"nli_scorer={name!r} lacks the weights {sorted(loading['missing_keys'])}, allowed: a trained classifier."
        )
    return ModelScorer(model.eval(), AutoTokenizer.from_pretrained(name))


def score_worlds(premises: Sequence[str], hypotheses: Sequence[str]) -> Tensor:
    """
    Exact scores `[pairs, 2]`, contradiction and neutral, of texts about the same subject of a procedural world.

    Texts contradict each other when both state a fact and its values differ, anywhere in them; they are neutral when
    they state no fact in common. A linked fact counts as the fact that it repeats.
    """
    scores = []
    for premise, hypothesis in zip(premises, hypotheses, strict=True):
        first, second = stated_values(premise), stated_values(hypothesis)
        shared = first.keys() & second.keys()
        differs = any(len(first[cue] | second[cue]) > 1 for cue in shared)
        scores.append([float(differs), float(not shared)])
    return torch.tensor(scores).view(-1, 2)


def stated_values(text: str) -> dict[str, set[str]]:
    """Values that a text states, by cue; a linked cue is filed under its source."""
    values: dict[str, set[str]] = {}
    for mention in parse_section(text):
        values.setdefault(CUES[mention.cue].source or mention.cue, set()).add(mention.value)
    return values


def label_columns(id2label: dict[int, str], name: str) -> tuple[int, int | None]:
    """
    Columns of contradiction and neutral in a classifier's logits.

    Args:
        id2label (`dict[int, str]`): Of the model's configuration; case does not matter.
        name (`str`): Of the model, for the message.

    Raises:
        `ValueError`: No label is called "contradiction". Models that tell only entailment from the rest have none.
    """
    columns = {label.lower(): int(column) for column, label in id2label.items()}
    if "contradiction" not in columns:
        raise ValueError(
            f"nli_scorer={name!r} has the labels {list(id2label.values())}, allowed: a model with one called "
            "'contradiction'."
        )
    return columns["contradiction"], columns.get("neutral")


class ModelScorer:
    """
    Scores pairs of texts with a classifier.

    Scores are `[pairs, 2]`: softmax over all labels, then contradiction and neutral; neutral is 0 where the model has
    no such label. Pairs that are too long for the model lose the end of the longer text, and a warning says how many.

    Args:
        model (`PreTrainedModel`): For sequence classification, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        batch_size (`int`, *optional*, defaults to 16): Pairs per call of the model, at least 1.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, allowed: at least 1.")
        self.contradiction, self.neutral = label_columns(model.config.id2label, model.config.name_or_path)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.max_length = min(positions, tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Tensor:
        """Scores `[pairs, 2]` on the CPU, contradiction and neutral."""
        scores, cut = [torch.zeros(0, 2)], 0
        for start in range(0, len(premises), self.batch_size):
            pairs = list(premises[start : start + self.batch_size]), list(hypotheses[start : start + self.batch_size])
            encoded = self.tokenizer(
                *pairs, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
            probabilities = self.model(**encoded.to(self.model.device)).logits.float().softmax(dim=-1).cpu()
            neutral = torch.zeros(len(pairs[0])) if self.neutral is None else probabilities[:, self.neutral]
            scores.append(torch.stack([probabilities[:, self.contradiction], neutral], dim=1))
        if cut:
            logger.warning(
                "%d of %d pairs are longer than %d tokens and were cut", cut, len(premises), self.max_length
            )
        return torch.cat(scores)
