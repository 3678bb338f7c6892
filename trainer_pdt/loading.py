"""Trained models and their tokenizers, from a folder or the Hub, as the recipes load them."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import resolve_revision

from modeling_pdt import PDTForParallelDecoding


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
    resolved = resolve_revision(model, revision=revision)
    pinned = {} if trunk_revision is None else {"trunk_revision": trunk_revision}
    trained = PDTForParallelDecoding.from_pretrained(model, revision=resolved, **pinned, **choices)
    return trained, AutoTokenizer.from_pretrained(model, revision=resolved)
