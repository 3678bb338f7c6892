"""Do the sections of one answer contradict each other? Every two of them, in both orders, judged by an NLI scorer."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.evaluation.consistency import NLI_MARGIN, check_control, nli_measures, standard_control
from trainer_pdt.evaluation.sections import take_documents
from trainer_pdt.losses import NLIScorer
from trainer_pdt.metrics.declared import metric_info
from trainer_pdt.nli import load_nli_scorer

DESCRIPTION = "Contradictions between sections by a three-class NLI model, with planted ones that it has to see."
INPUTS = """
Args:
    predictions (`list[list[str]]`): Sections of each answer.
    scorer (`str` or callable): Folder or Hub id of a sequence classification model with a label called
        *contradiction*, `"worlds"` for the exact one of procedural worlds, or a callable that maps premises and
        hypotheses to probabilities `[pairs, 2]` of contradiction and neutral.
    margin (`float`, *optional*, defaults to 0.1): Contradiction allowed above neutral.
    control (`dict[str, list[list[str]]]`, *optional*): Answers of your own kind of text, `given` without and `planted`
        with contradictions. Missing = held-out documents of procedural worlds.
    kwargs: For the model's `from_pretrained`.

Returns:
    `dict`: `violation`, the mean `relu(contradiction - neutral - margin)` over pairs, `contradicting`, the share of
    pairs where it is above 0, and both for the control's `given` and `planted`. Values are `{mean, low, high, n}`.

Raises:
    `ValueError`: The scorer does not see what was planted: its `violation` there is not clearly above that of `given`.
"""


class Contradiction(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.evaluation.consistency`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("string"))}
        return metric_info(DESCRIPTION, INPUTS, **features)

    def _compute(
        self,
        predictions: Sequence[Sequence[str]],
        scorer: str | NLIScorer,
        margin: float = NLI_MARGIN,
        control: Mapping[str, Sequence[Sequence[str]]] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        judge = load_nli_scorer(scorer, **kwargs) if isinstance(scorer, str) else scorer
        seen = check_control(judge, standard_control() if control is None else control, margin)
        return take_documents({**nli_measures(judge, predictions, margin), "control": seen})[0]
