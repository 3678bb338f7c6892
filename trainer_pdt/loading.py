"""Trained models and their tokenizers, from a folder or the Hub, as the recipes load them."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import resolve_revision

from modeling_pdt import PDTConfig, PDTForParallelDecoding


def check_source(name: str, value: str, model_type: str | None = None) -> None:
    """
    Refuses, naming the option, what no model can be loaded from.

    Args:
        name, value (`str`): The option: a folder, or a repository of the Hub.
        model_type (`str`, *optional*): What the `config.json` of a folder has to say; missing = anything.

    Raises:
        ValueError: For a folder without such a `config.json`, for what is no folder and could not be a repository,
            and, while the Hub is switched off, for a repository of which nothing was ever downloaded.
    """
    if Path(value).is_dir():
        check_folder(name, Path(value), model_type)
        return
    allowed = f"{name}={value!r}, allowed: a folder that exists, or a repository of the Hub"
    try:
        validate_repo_id(value)
    except HFValidationError:
        raise ValueError(f"{allowed}.") from None
    kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=value, repo_type="model")
    if constants.is_offline_mode() and not kept.is_dir():
        raise ValueError(
            f"{allowed}: there is no such folder here, and the Hub is switched off (HF_HUB_OFFLINE) with nothing of "
            "such a repository in the cache."
        )


def check_folder(name: str, folder: Path, model_type: str | None = None) -> None:
    """Raises `ValueError`, naming the option, for a folder whose `config.json` is missing or of another kind."""
    kind = "a model" if model_type is None else f"a {model_type.upper()} model (model_type={model_type!r})"
    allowed = f"{name}={str(folder)!r}, allowed: a folder with the config.json of {kind};"
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{allowed} it holds none.")
    if model_type is None:
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{allowed} its config.json is no JSON.") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != model_type:
        raise ValueError(f"{allowed} its config.json has {f'model_type={found!r}' if found else 'no model_type'}.")


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
    if revision is not None and Path(model).is_dir():
        raise ValueError(f"revision={revision!r}, allowed: none, the model {model} is a folder.")
    check_source("model", model, PDTConfig.model_type)
    if Path(model).is_dir() and not any(Path(model).glob("tokenizer*")):
        raise ValueError(
            f"model={model!r} holds no tokenizer, allowed: a folder with the trunk's tokenizer beside the model. Save "
            f"it there: AutoTokenizer.from_pretrained(TRUNK).save_pretrained({model!r})."
        )
    resolved = resolve_revision(model, revision=revision)
    pinned = {} if trunk_revision is None else {"trunk_revision": trunk_revision}
    trained = PDTForParallelDecoding.from_pretrained(model, revision=resolved, **pinned, **choices)
    return trained, AutoTokenizer.from_pretrained(model, revision=resolved)
