"""BERTScore, where its library is installed: `pip install -e ".[bertscore]"`."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any


def check_bert_score(options: Mapping[str, Any]) -> None:
    """
    Checks that BERTScore can be measured.

    Args:
        options (`Mapping[str, Any]`): Keyword arguments of `bert_score.BERTScorer`.

    Raises:
        ValueError: The options name neither a model nor a language.
        ImportError: The library is not installed.
    """
    if not options.keys() & {"model_type", "lang"}:
        raise ValueError(f"bert_score={dict(options)}, allowed: arguments of BERTScorer with `model_type` or `lang`.")
    if find_spec("bert_score") is None:
        raise ImportError(
            'bert_score needs the library bert-score, which is not installed: pip install "bert-score>=0.3.13,<0.4".'
        )


def bert_score_f1(answers: Sequence[str], references: Sequence[str], options: Mapping[str, Any]) -> list[float]:
    """
    F1 of BERTScore (Zhang et al. 2020, 1904.09675) of every answer beside its reference.

    Args:
        answers (`Sequence[str]`), references (`Sequence[str]`): One per prompt.
        options (`Mapping[str, Any]`): See [`check_bert_score`]. A model that the library does not know, a folder for
            example, also needs `num_layers`.
    """
    check_bert_score(options)
    from bert_score import BERTScorer

    if not answers:
        return []
    return BERTScorer(**options).score(list(answers), list(references))[2].tolist()
