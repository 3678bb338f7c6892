"""Trained models and their tokenizers, from a folder or the Hub, as the recipes load them."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import resolve_revision

from modeling_pdt import PDTForParallelDecoding


def check_source(name: str, value: str) -> None:
    """Raises `ValueError`, naming the option, for what is neither a folder nor could be a repository of the Hub."""
    if Path(value).is_dir():
        return
    try:
        validate_repo_id(value)
    except HFValidationError:
        raise ValueError(f"{name}={value!r}, allowed: a folder that exists, or a repository of the Hub.") from None


def load_trained(
    model: str, revision: str | None = None, trunk_revision: str | None = None, **choices: Any
) -> tuple[PDTForParallelDecoding, PreTrainedTokenizerBase]:
    """
    A trained model and its tokenizer, both from one commit.

    Args:
        model (`str`): Folder or Hub repository of trained adapters.
        revision (`str`, *optional*): Branch, tag or commit of that repository; missing = its main branch.
        trunk_revision (`str`, *optional*): Of the trunk on the Hub; missing = the commit that the model names.
        choices: Further arguments of `from_pretrained`.
    """
    check_source("model", model)
    if revision is not None and Path(model).is_dir():
        raise ValueError(f"revision={revision!r}, allowed: none, the model {model} is a folder.")
    resolved = resolve_revision(model, revision=revision)
    pinned = {} if trunk_revision is None else {"trunk_revision": trunk_revision}
    trained = PDTForParallelDecoding.from_pretrained(model, revision=resolved, **pinned, **choices)
    return trained, AutoTokenizer.from_pretrained(model, revision=resolved)
