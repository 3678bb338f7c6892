"""States of the frozen lower trunk on disk, for stages that train heads on documents they have seen before."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.trunk_split import TapState, run_lower

from .branches import TOKEN_LOSSES
from .curriculum import Stage
from .telemetry import fingerprint, read_json, write_json

DESCRIPTION_FILE = "cache.json"
"""What made the states; a cache of anything else is refused."""

UPPER_LOSSES = (*TOKEN_LOSSES, "notes")
"""Losses that need the upper trunk; a stage without them trains heads alone."""

INDIFFERENT = ("_name_or_path", "transformers_version", "use_cache", "architectures")
"""Fields of a trunk's configuration that no state depends on."""


class TapCache:
    """
    One file per row, named by its tokens and positions, so that documents, views and processes share what is equal.

    A batch is read when all of its rows are there; else it is computed as usual and its rows are written. Files appear
    complete or not at all, so any number of processes may use one folder at the same time.

    Args:
        folder (`str` or `Path`): Created if missing.
        model (`PDTForParallelDecoding`): The unwrapped model; its trunk stays as it is.
        precision (`str`): Mixed precision of the run, such as `"no"` or `"bf16"`.

    Raises:
        ValueError: For a folder with states of another trunk, split or precision, and for a trunk that is sharded (its
            processes have to run every layer together) or has dropout.
    """

    def __init__(self, folder: str | Path, model: PDTForParallelDecoding, precision: str) -> None:
        self.folder, self.stack = Path(folder), model.stack
        trunk = model.trunk
        if is_deepspeed_zero3_enabled() or any(isinstance(parameter, DTensor) for parameter in trunk.parameters()):
            raise ValueError(f"lower_cache_dir={str(folder)!r}, allowed with ZeRO-3 or FSDP2: none.")
        dropout = getattr(trunk.config.get_text_config(decoder=True), "attention_dropout", 0.0)
        if dropout:
            raise ValueError(f"lower_cache_dir={str(folder)!r}, allowed with attention_dropout={dropout}: none.")
        self._check(describe(model, precision))

    def _check(self, description: dict[str, Any]) -> None:
        file = self.folder / DESCRIPTION_FILE
        if not file.is_file():
            write_json(file, description)
        found = read_json(file)
        for name, value in description.items():
            if found.get(name) != value:
                raise ValueError(f"{file}: {name} is {found.get(name)!r}, allowed for this run: {value!r}.")

    @staticmethod
    def serves(stage: Stage) -> bool:
        """Whether a stage trains heads alone."""
        return not any(stage.is_active(loss) for loss in UPPER_LOSSES)

    def read(self, inputs: Mapping[str, Tensor]) -> TapState | None:
        """
        The lower half of a batch, `None` unless all of its rows are there.

        Args:
            inputs (`Mapping[str, Tensor]`): `input_ids`, `attention_mask` and `position_ids` `[R, T]`.

        Raises:
            ValueError: For a file that is damaged.
        """
        files = self._files(inputs)
        if not all(file.is_file() for file in files):
            return None
        names = ("input_ids", "attention_mask", "position_ids")
        with torch.no_grad():
            start = run_lower(self.stack.base_layer, 0, **{name: inputs[name] for name in names})
            states = torch.cat([_load(file) for file in files]).to(start.hidden.device)
            hidden = states.new_zeros(start.hidden.shape)
            hidden[inputs["attention_mask"].bool()] = states
        return replace(start, hidden=hidden, split=self.stack.split)

    def write(self, inputs: Mapping[str, Tensor], tap: TapState) -> None:
        """
        Keeps the rows of a batch that are not there yet.

        Args:
            inputs (`Mapping[str, Tensor]`): See [`read`].
            tap (`TapState`): What the model computed for them.
        """
        masks = inputs["attention_mask"].bool()
        for file, hidden_TD, mask_T in zip(self._files(inputs), tap.hidden.detach(), masks, strict=True):
            if not file.is_file():
                file.parent.mkdir(exist_ok=True)
                _place(file, hidden_TD[mask_T].contiguous().cpu())

    def _files(self, inputs: Mapping[str, Tensor]) -> list[Path]:
        rows = torch.stack([inputs["input_ids"], inputs["position_ids"]], dim=1).cpu()
        names = [
            hashlib.sha256(row[:, mask].contiguous().numpy().tobytes()).hexdigest()
            for row, mask in zip(rows, inputs["attention_mask"].bool().cpu(), strict=True)
        ]
        return [self.folder / name[:2] / f"{name}.safetensors" for name in names]


def describe(model: PDTForParallelDecoding, precision: str) -> dict[str, Any]:
    """
    All that the states of a row depend on beside its tokens.

    Args:
        model (`PDTForParallelDecoding`): The unwrapped model.
        precision (`str`): Mixed precision of the run.
    """
    stack = model.stack
    digest = hashlib.sha256()
    for part in (stack.base_layer.embed_tokens, *stack.base_layer.layers[: stack.split]):
        for name, value in part.state_dict().items():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    config = {key: value for key, value in stack.base_layer.config.to_dict().items() if key not in INDIFFERENT}
    return {
        "weights": digest.hexdigest(),
        "config": fingerprint(config),
        "split": stack.split,
        "dtype": str(stack.base_layer.embed_tokens.weight.dtype).removeprefix("torch."),
        "mixed_precision": precision,
    }


def _place(file: Path, states_TD: Tensor) -> None:
    """Writes beside the file and moves it into its place in one step."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".unfinished-")
    os.close(handle)
    try:
        save_file({"hidden": states_TD}, name)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _load(file: Path) -> Tensor:
    try:
        return load_file(file)["hidden"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}), allowed: a file of this cache; delete it.") from error
