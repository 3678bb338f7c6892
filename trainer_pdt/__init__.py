"""Data, training and evaluation of the Parallel Decoder Transformer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import PDTTrainingArguments
    from .collator import PDTDataCollator
    from .features import FeatureMaker
    from .trainer import PDTTrainer

__all__ = ["FeatureMaker", "PDTDataCollator", "PDTTrainer", "PDTTrainingArguments"]

_HOMES = {
    "FeatureMaker": "features",
    "PDTDataCollator": "collator",
    "PDTTrainer": "trainer",
    "PDTTrainingArguments": "arguments",
}


def __getattr__(name: str) -> Any:
    """Loads torch and transformers only when a trainer class is asked for; `trainer_pdt.data` needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
