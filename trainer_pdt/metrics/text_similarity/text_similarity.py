"""How far do answers written in parallel differ from those written one section after another?"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.data.counting import bootstrap_rate
from trainer_pdt.decode_metrics import similarity
from trainer_pdt.evaluation.scoring import rate_dict
from trainer_pdt.evaluation.sections import take_documents

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
    """`evaluate` module of `trainer_pdt.decode_metrics.similarity`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        pairs = [similarity(*pair) for pair in zip(predictions, references, strict=True)]
        names = ("rouge_l", "tf_idf_cosine", "words_more")
        values = {name: [pair[name] for pair in pairs if pair[name] is not None] for name in names}
        return take_documents(
            {name: rate_dict(bootstrap_rate((v, 1) for v in found)) for name, found in values.items()}
        )[0]
