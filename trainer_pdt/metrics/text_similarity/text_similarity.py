"""How far do answers written in parallel differ from those written one section after another?"""

from collections.abc import Sequence
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

Returns:
    `dict`: `rouge_l`, `tf_idf_cosine` and `words_more`, the words of the prediction beyond those of the reference over
    the reference's, as `{mean, low, high, n}`; intervals resample prompts. A pair with an empty reference has no
    `words_more`.
"""


class TextSimilarity(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.evaluation.answers.answer_similarity`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return metric_info(DESCRIPTION, INPUTS, **features)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        return take_documents(answer_similarity(predictions, references))[0]
