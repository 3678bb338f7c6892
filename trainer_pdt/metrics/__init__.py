"""Measures as modules of the library `evaluate`: of texts, probabilities and facts, whoever made them.

Every module is a folder that `evaluate.load` takes by its path, without network. The formulas are those of
`trainer_pdt`; a value is `{mean, low, high, n}` with a 95 % interval over documents, as in `evaluation.json`.
"""

from pathlib import Path
from typing import Any

import evaluate

METRICS = (
    *("agreement", "attribute_consistency", "contradiction", "coverage", "dependency_ce", "judge"),
    *("note_usage", "redundancy", "sibling_fact_recall", "text_similarity"),
)
"""Names of the modules; each is a folder beside this file."""


def load_metric(name: str, **kwargs: Any) -> evaluate.EvaluationModule:
    """
    A module by its name.

    Args:
        name (`str`): One of [`METRICS`].
        kwargs: For `evaluate.load`, for example `keep_in_memory` or `experiment_id`.
    """
    if name not in METRICS:
        raise ValueError(f"name={name!r}, allowed: {', '.join(METRICS)}.")
    return evaluate.load(str(Path(__file__).parent / name), **kwargs)
