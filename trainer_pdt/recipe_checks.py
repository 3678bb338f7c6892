"""What recipes that start others know of their fields, so that wrong ones are refused before anything is made."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_pdt import PDTAdapterConfig

from .arguments import CurriculumArguments, DataArguments, ModelArguments, PDTTrainingArguments
from .decode_arguments import DecodeArguments
from .evaluation.arguments import EvaluationArguments
from .parser import RecipeParser
from .runs import EVALUATE, TRAIN

DECODE = "recipes/decode.py"
FIELDS: dict[str, tuple[type, ...]] = {
    TRAIN: (PDTAdapterConfig, ModelArguments, DataArguments, CurriculumArguments, PDTTrainingArguments),
    EVALUATE: (EvaluationArguments,),
    DECODE: (DecodeArguments,),
}
"""What each script reads its fields into."""


def check_fields(script: str, values: Mapping[str, Any]) -> None:
    """
    Raise the error that a script would raise for its fields; nothing for a script that [`FIELDS`] lacks.

    Args:
        script (`str`): Path of the recipe, relative to the repository.
        values (`Mapping[str, Any]`): Its fields, complete.
    """
    if script not in FIELDS:
        return
    found = RecipeParser(*FIELDS[script]).parse_values(values)
    if script == TRAIN:
        adapter, _, data, curriculum, training = found
        data.for_streams(adapter.num_streams)
        curriculum.build(training.max_steps)


def check_command(command: Sequence[str]) -> None:
    """
    The same for a command line.

    Args:
        command (`Sequence[str]`): Interpreter, script and its options.
    """
    _, script, *words = command
    RecipeParser(*FIELDS[script]).parse(words)
