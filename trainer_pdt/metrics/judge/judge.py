"""Which answers does a chat model prefer? Pairs of answers, each judged in both orders."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.evaluation.judge import judge_pairs, make_judge
from trainer_pdt.metrics.declared import metric_info

DESCRIPTION = "Wins of answers over others, judged by a chat model in both orders, along five axes and over all."
INPUTS = """
Args:
    predictions (`list[str]`): Answers.
    references (`list[str]`): Answers to the same requests.
    requests (`list[str]`): The requests.
    store (`str`): File that keeps what the model has said; nothing is asked for twice.
    options: Further fields of `trainer_pdt.evaluation.judge.Judge`: `model`, `base_url` of an OpenAI-compatible
        server, `api_key_variable`, `budget_tokens`, and so on.

Returns:
    `dict`: `axes` (`overall`, `relevance`, `coherence`, `diversity`, `integrity`, `immersion`), each with `win`,
    `tie`, `loss`, `net_win_rate`, `consistent` (both orders agree) and `first_place` (where they do not, share in
    which the first place gains) as `{mean, low, high, n}`, and `bias` (`first`, `second` or `None`); numbers of
    `pairs`, `judged`, `failed`; `stopped`; `tokens` and `cost_usd`.
"""


class Judge(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.evaluation.judge.judge_pairs`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return metric_info(DESCRIPTION, INPUTS, **features)

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        requests: Sequence[str],
        store: str,
        **options: Any,
    ) -> dict[str, Any]:
        pairs = list(zip(requests, predictions, references, strict=True))
        return judge_pairs(make_judge(options, store), pairs)
