"""How far do answers written in parallel differ from those written one section after another?"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.evaluation.answers import answer_similarity
from trainer_pdt.evaluation.sections import take_documents
from trainer_pdt.metrics.declared import metric_info

DESCRIPTION = "ROUGE-L, TF-IDF cosine and length of texts beside reference texts on the same prompts."
INPUTS = """
Args:
    predictions (`list[str]`): Answers, for example of parallel decoding.
    references (`list[str]`): Answers to the same prompts, for example of sequential decoding.
    bert_score (`dict`, *optional*): Arguments of `bert_score.BERTScorer`, `{"model_type": "roberta-large"}` for
        example; needs the library `bert-score`. Missing = without it.

Returns:
    `dict`: `rouge_l`, `tf_idf_cosine` and `words_more`, the words of the prediction beyond those of the reference over
    the reference's, as `{mean, low, high, n}`; intervals resample prompts. A pair with an empty reference has no
    `words_more`. With `bert_score` also `bert_score_f1`.
"""


class TextSimilarity(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.evaluation.answers.answer_similarity`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return metric_info(DESCRIPTION, INPUTS, **features)

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], bert_score: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        return take_documents(answer_similarity(predictions, references, bert_score))[0]
