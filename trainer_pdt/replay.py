"""Replay of a decoding call: what it drew from its model is stored, and the call runs again without the trunk.

The tape holds every output of the modules in `taped_modules`, in the order of their calls: logits, notes, coverage,
agreement and, where the bus keeps notes by it, attention. A replay is the decoder itself on a placeholder of one
silent layer whose modules answer from the tape; choice of tokens, windows, judgement, rollback, interventions and the
trace run as they did.

Letters: M rows of a call, V vocabulary, N note width.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_pdt import ParallelGenerateOutput, PDTForParallelDecoding, PDTGenerationConfig
from modeling_pdt.callbacks import ParallelDecodingCallback, TokenRecorder
from modeling_pdt.generation_inputs import Inputs
from modeling_pdt.generation_pdt import ParallelDecoder
from modeling_pdt.generation_settings import Settings
from modeling_pdt.interventions import INTERVENTIONS, intervention_from_dict
from modeling_pdt.plan import PlanEntry
from modeling_pdt.sampling import row_processors
from trainer_pdt.telemetry import read_json, write_json

REPLAY_VERSION = "1.0"
REPLAY_FILE, START_FILE, CHUNK_FILE = "replay.json", "start.safetensors", "tape-{:05d}.safetensors"
# Fields of `Inputs` that are objects: each has a form of its own in the artefact.
OBJECTS = ("processors", "criteria", "interventions", "entries", "config", "merge")
MODEL_FIELDS = ("block_size", "bus_lag", "bus_capacity", "plan_on_bus", "commit_horizon", "plan_hash_salt")
ADAPTER_FIELDS = ("num_streams", "notes_dim", "notes_per_block", "plan_vocab_size", "trained_parts")


def taped_modules(decoder: ParallelDecoder) -> dict[str, nn.Module]:
    """The modules whose outputs decide: everything else a decoding call computes follows from these."""
    heads = decoder.stack.heads
    modules = {
        "logits": decoder.model.get_output_embeddings(),
        "notes": heads.note_norm,
        "coverage": heads.coverage,
        "agreement": heads.agreement.score,
    }
    return {**modules, "attention": decoder.readings.meter} if decoder.readings.received else modules


class ReplayRecorder(ParallelDecodingCallback):
    """
    Callback that stores what a call needs to run again.

    Logits are stored in the trunk's own precision, and only the two best of each row where nothing else can be chosen
    (greedy, without processors).

    Args:
        folder (`str` or `Path`): Made where missing; must hold no artefact yet. `replay.json` is written last.
        chunk_calls (`int`, *optional*, defaults to 256): Trunk calls per file.

    Example:

    ```python
    >>> with ReplayRecorder("runs/replay") as recorder:
    ...     output = model.generate(**inputs, callbacks=[recorder])
    ```
    """

    def __init__(self, folder: str | Path, chunk_calls: int = 256) -> None:
        if chunk_calls < 1:
            raise ValueError(f"chunk_calls must be >= 1, got {chunk_calls}.")
        self.folder, self.chunk_calls = Path(folder), chunk_calls
        if any(self.folder.glob("*.safetensors")) or (self.folder / REPLAY_FILE).exists():
            raise ValueError(f"{self.folder} holds a replay artefact; give a folder of its own to every call.")
        self.decoder: ParallelDecoder | None = None
        self.counts: dict[str, int] = {}
        self.pending: dict[str, torch.Tensor] = {}
        self.calls = self.chunks = 0
        self.handles: list[Any] = []
        self.is_open = False

    def __enter__(self) -> "ReplayRecorder":
        self.is_open = True
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        self.is_open = False
        for handle in self.handles:
            handle.remove()
        if kind is None and self.decoder is not None:
            self._flush()
            self._finish()

    def on_plan(self, decoder: ParallelDecoder) -> None:
        """Checks that the call can be stored, and listens to its model."""
        if self.decoder is not None or not self.is_open:
            raise ValueError("a ReplayRecorder stores one call, inside a `with` statement.")
        inputs = decoder.inputs
        self.record = {name: _stored(name, value) for name, value in vars(inputs).items() if _is_json(name, value)}
        self.record["entries"] = [[dataclasses.asdict(entry) for entry in entries] for entries in inputs.entries]
        self.record["interventions"] = [_intervention_record(one) for one in inputs.interventions]
        self.tensors = {name: value for name, value in vars(inputs).items() if torch.is_tensor(value)}
        if inputs.criteria or inputs.custom_processors or inputs.merge:
            raise ValueError("a replay cannot store logits_processor, stopping_criteria, stop_strings or merge.")
        settings = decoder.settings
        self.best_two = not (settings.do_sample or settings.sensitivity_probe or any(inputs.processors))
        self.decoder = decoder
        for name, module in taped_modules(decoder).items():
            self.counts[name] = 0
            self.handles.append(module.register_forward_hook(self._hook(name)))

    def on_token(self, decoder: ParallelDecoder, *chosen: torch.Tensor) -> None:
        """Closes a file every so many trunk calls."""
        self.calls += 1
        if self.calls % self.chunk_calls == 0:
            self._flush()

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            key = f"{name}.{self.counts[name]}"
            self.counts[name] += 1
            if name == "logits" and self.best_two and output.shape[-1] > 2:
                self.pending[f"{key}.values"], self.pending[f"{key}.index"] = map(torch.Tensor.cpu, output.topk(2))
                self.vocab_size = output.shape[-1]
            else:
                self.pending[key] = output.detach().cpu().contiguous().clone()

        return keep

    def _flush(self) -> None:
        if self.pending:
            self.folder.mkdir(parents=True, exist_ok=True)
            _save(self.pending, self.folder / CHUNK_FILE.format(self.chunks))
            self.chunks, self.pending = self.chunks + 1, {}

    def _finish(self) -> None:
        decoder, config = self.decoder, self.decoder.model.config
        _save(self.tensors, self.folder / START_FILE)
        record = {
            "version": REPLAY_VERSION,
            "chunks": self.chunks,
            "outputs": self.counts,
            "vocab_size": getattr(self, "vocab_size", None),
            "config": {name: getattr(config, name) for name in MODEL_FIELDS},
            "adapter": {name: getattr(config, name) for name in ADAPTER_FIELDS},
            "settings": dataclasses.asdict(decoder.settings),
            "generation_config": decoder.inputs.config.to_dict(),
            "inputs": self.record,
            "trace": decoder.trace.to_manifest(),
        }
        write_json(self.folder / REPLAY_FILE, record)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes tensors as readable as other files; safetensors makes private ones."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)


def _is_json(name: str, value: Any) -> bool:
    return name not in OBJECTS and not torch.is_tensor(value)


def _stored(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"a replay cannot store inputs.{name}: {error}.") from error


def _intervention_record(intervention: Any) -> dict[str, Any]:
    name = intervention.name
    if type(intervention) is not INTERVENTIONS.get(name):
        raise ValueError(f"a replay stores interventions of {sorted(INTERVENTIONS)}, got {intervention!r}.")
    return _stored(name, intervention.to_dict())


class TapeReader:
    """
    Gives the outputs of a stored call back, in order.

    Args:
        folder (`Path`): The artefact.
        record (`dict`): Content of its `replay.json`.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.record, self.next = record, dict.fromkeys(record["outputs"], 0)
        self.files = [safe_open(folder / CHUNK_FILE.format(i), framework="pt") for i in range(record["chunks"])]
        self.places = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118 (not a mapping)

    def read(self, name: str, rows: int) -> torch.Tensor:
        """
        The next output of a module.

        Raises:
            RuntimeError: When the tape ends here, or holds another number of rows: the replay has left the call.
        """
        key = f"{name}.{self.next[name]}"
        self.next[name] += 1
        if key in self.places:
            output = self.places[key].get_tensor(key)
        elif f"{key}.values" in self.places:
            values, index = (self.places[f"{key}.{part}"].get_tensor(f"{key}.{part}") for part in ("values", "index"))
            output = values.new_full((values.shape[0], self.record["vocab_size"]), -torch.inf)
            output.scatter_(1, index, values)
        else:
            raise RuntimeError(f"the replay asks for {key}, the tape holds {self.record['outputs'][name]} of them.")
        if output.shape[0] != rows:
            raise RuntimeError(f"the replay has left the call at {key}: {rows} rows, the tape has {output.shape[0]}.")
        return output

    def check_end(self) -> None:
        """Raises `RuntimeError` when something on the tape was not asked for."""
        if self.next != self.record["outputs"]:
            raise RuntimeError(f"the replay used {self.next} of the tape's {self.record['outputs']} outputs.")


class SilentEmbedding(nn.Module):
    """
    Token embedding of a placeholder: zeros for any token.

    Args:
        width (`int`): D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, ids_RT: torch.Tensor) -> torch.Tensor:
        """Zeros `[R, T, D]`."""
        return self.weight.expand(*ids_RT.shape, -1)


def placeholder(record: dict[str, Any]) -> PDTForParallelDecoding:
    """A model of one silent layer with the notes and the block protocol of the stored call."""
    adapter = dict(record["adapter"])
    trained, width = adapter.pop("trained_parts"), adapter["notes_dim"] + adapter["notes_dim"] % 2
    trunk = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
        )
    )
    model = PDTForParallelDecoding.from_trunk(
        trunk, instrumented_layers=1, snc_heads=1, num_plan_slots=1, plan_dim=1, **adapter, **record["config"]
    )
    model.config._adapter_config.trained_parts = trained
    model.stack.base_layer.embed_tokens = SilentEmbedding(width)
    return model.eval()


@contextmanager
def answering(decoder: ParallelDecoder, tape: TapeReader) -> Iterator[None]:
    """Inside, the taped modules of `decoder` give what the tape holds."""
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: tape.read(name, output.shape[0]))
        for name, module in taped_modules(decoder).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_call(folder: Path, record: dict[str, Any], model: PDTForParallelDecoding) -> tuple[Inputs, Settings]:
    """Inputs and settings of the stored call, as the decoder takes them."""
    settings = Settings.from_dict(record["settings"])
    config = PDTGenerationConfig.from_dict(record["generation_config"])
    with safe_open(folder / START_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    stored = {name: value for name, value in record["inputs"].items() if name not in OBJECTS}
    starts = [stored["prompts"][row // settings.num_streams] + header for row, header in enumerate(stored["headers"])]
    processors, _ = row_processors(model, config, starts, settings.max_new_tokens)
    inputs = Inputs(
        **stored,
        **tensors,
        entries=[[PlanEntry(**entry) for entry in entries] for entries in record["inputs"]["entries"]],
        processors=processors,
        interventions=tuple(map(intervention_from_dict, record["inputs"]["interventions"])),
    )
    return inputs, settings


def replay(folder: str | Path, callbacks: list[ParallelDecodingCallback] | None = None) -> ParallelGenerateOutput:
    """
    Runs a stored call again, on the CPU and without its trunk.

    Args:
        folder (`str` or `Path`): From [`ReplayRecorder`].
        callbacks (`list`, *optional*): As in `generate`.

    Returns:
        What `generate` returned; its trace differs in what was measured (seconds and bytes) only.

    Raises:
        ValueError: For a folder without a complete artefact of this version.
        RuntimeError: When the decoder asks for something else than the call did.
    """
    folder = Path(folder)
    record = read_record(folder)
    model = placeholder(record)
    inputs, settings = read_call(folder, record, model)
    recorder = [TokenRecorder()] if "tokens" in record["trace"] else []
    tape = TapeReader(folder, record)
    decoder = ParallelDecoder(model, inputs, settings, callbacks=[*recorder, *(callbacks or ())])
    with torch.no_grad(), answering(decoder, tape):
        output = decoder.run()
    tape.check_end()
    output.trace.model = record["trace"]["model"]
    return output


def read_record(folder: str | Path) -> dict[str, Any]:
    """Content of an artefact's `replay.json`; refuses an incomplete artefact and other versions."""
    path = Path(folder) / REPLAY_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no complete replay artefact: {REPLAY_FILE} is missing.")
    record = read_json(path)
    if record.get("version") != REPLAY_VERSION:
        raise ValueError(f"{path}: version={record.get('version')!r}, allowed: {REPLAY_VERSION!r}.")
    return record
