"""Options of `recipes/decode.py`, and what they mean for `generate`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from modeling_pdt import PDTGenerationConfig
from modeling_pdt.configuration_generation import INHERITED_FIELDS
from modeling_pdt.interventions import make_interventions

from .arguments import check_whole
from .curriculum import check_range
from .parser import described, load_yaml
from .render import render_header

# The recipe's own options of these names say more than the field of the generation configuration.
RECIPE_OWNS = ("plan",)
MANIFEST_OPTIONS = ("token_records", "reading_records", "memory_report", "reference_notes")


def generation_fields() -> list[str]:
    """Fields that [`PDTGenerationConfig`] adds to `GenerationConfig` and that the recipe passes on as they are."""
    return [name for name in vars(PDTGenerationConfig()) if name not in {*INHERITED_FIELDS, *RECIPE_OWNS}]


def read_requests(prompt: str | None, prompt_file: str | None) -> list[str]:
    """
    The request given, or the lines of the file that are not empty; none of neither.

    Raises:
        ValueError: For a file without any.
    """
    if prompt_file is None:
        return [] if prompt is None else [prompt]
    lines = [line for line in Path(prompt_file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompt_file={prompt_file!r}, allowed: a request per line; it has none.")
    return lines


def read_seed_notes(path: str) -> torch.Tensor:
    """
    Vectors `[places, width]` of a file `{notes: [[...], ...]}`.

    Raises:
        ValueError: For a file of another form.
    """
    content = load_yaml(path)
    try:
        return torch.tensor(content["notes"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"seed_notes={path!r}, allowed: {{notes: [[...], ...]}} with vectors of equal length; it has the keys "
            f"{sorted(content)}. {type(error).__name__}: {error}"
        ) from error


def sampling_options(temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
    """
    How `generate` is to choose tokens; a temperature of 0 takes the likeliest.

    Raises:
        ValueError: For an impossible value.
    """
    check_range("temperature", temperature, 0.0)
    check_whole("top_k", top_k, 0)
    check_range("top_p", top_p, 0.0, 1.0, above=True)
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


GenerationOptions = dataclasses.make_dataclass(
    "GenerationOptions",
    [
        (name, Any, field(default=None, metadata={"help": described(PDTGenerationConfig, name)}))
        for name in generation_fields()
    ],
    kw_only=True,
    namespace={"__doc__": "Fields of `PDTGenerationConfig`; `None` means the value that the model was saved with."},
)


@dataclass(kw_only=True)
class DecodeArguments(GenerationOptions):
    """What `recipes/decode.py` reads from YAML and the command line, beside the fields of `PDTGenerationConfig`."""

    model: str = field(metadata={"help": "Folder or Hub repository of trained adapters."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model's repository."})
    trunk_revision: str | None = field(
        default=None, metadata={"help": "Of the trunk on the Hub; missing = the commit that the model names."}
    )
    prompt: str | None = field(default=None, metadata={"help": "The request."})
    prompt_file: str | None = field(default=None, metadata={"help": "File with one request per line."})
    plan: Literal["trunk", "planner", "none"] = field(
        default="trunk", metadata={"help": "Who plans: the trunk writes an outline, the planner head, or nobody."}
    )
    plan_texts: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Plan items {text: ..., stream: ...} in place of `plan`."}
    )
    plan_contract: str | None = field(
        default=None, metadata={"help": "YAML or JSON file of a document's items and streams, in place of plan_texts."}
    )
    headers: list[str] | None = field(default=None, metadata={"help": "Section headers, one per stream."})
    stream_prefixes: list[str] | None = field(
        default=None, metadata={"help": "Starts of the sections as they are, in place of `headers`."}
    )
    seed_texts: list[str] | None = field(default=None, metadata={"help": "Notes at the start, one text per stream."})
    seed_notes: str | None = field(
        default=None, metadata={"help": "YAML or JSON file {notes: [[...], ...]} with vectors of the notes' width."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens per section."})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token."})
    top_k: int = field(default=0, metadata={"help": "Sample from the likeliest tokens only; 0 for all."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1: tokens of the row become less likely."})
    seed: int = field(default=0, metadata={"help": "The same seed writes the same answer."})
    interventions: list[str] = field(default_factory=list, metadata={"help": "Names, for instance ablate or stale."})
    manifest: str | None = field(default=None, metadata={"help": "JSON file for the trace and the texts."})
    token_records: bool = field(default=False, metadata={"help": "A record per token in the manifest."})
    reading_records: bool = field(default=False, metadata={"help": "Who read which note, in the manifest."})
    memory_report: bool = field(default=False, metadata={"help": "Bytes of caches and notes in the manifest."})
    reference_notes: str | None = field(
        default=None, metadata={"help": "YAML or JSON file of notes that go into the manifest for evaluation."}
    )
    stream_jsonl: str | None = field(default=None, metadata={"help": "File for a line of JSON per token and event."})
    replay_folder: str | None = field(default=None, metadata={"help": "Folder for what recipes/replay.py needs."})
    replay_chunk_calls: int = field(default=256, metadata={"help": "Trunk calls per file of the replay artefact."})
    device: str | None = field(default=None, metadata={"help": "Of the model: cuda, cuda:1, mps; default: the CPU."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})

    def __post_init__(self) -> None:
        sampling_options(self.temperature, self.top_k, self.top_p)
        check_range("repetition_penalty", self.repetition_penalty, 0.0, above=True)
        for name in ("max_new_tokens", "replay_chunk_calls"):
            check_whole(name, getattr(self, name), 1)
        if self.threads is not None:
            check_whole("threads", self.threads, 1)
        PDTGenerationConfig(**self.generation_options())
        self.check_files()

    def check_files(self) -> None:
        """Raises `ValueError` for files that cannot be read or written, and for what only a manifest would hold."""
        for name in MANIFEST_OPTIONS:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.manifest is None and value != default:
                raise ValueError(f"{name}={value!r}, allowed with manifest=None: {default}, it is for the manifest.")
        for name in ("manifest", "stream_jsonl"):
            if getattr(self, name) is not None and Path(getattr(self, name)).is_dir():
                raise ValueError(f"{name}={getattr(self, name)!r}, allowed: a file, it is a folder.")
        for name in ("plan_contract", "seed_notes", "reference_notes"):
            path = getattr(self, name)
            if path is None:
                continue
            try:
                load_yaml(path)
            except (OSError, ValueError) as error:
                raise ValueError(f"{name}={path!r}, allowed: a YAML or JSON file with a mapping; {error}") from error

    def requests(self) -> list[str]:
        """The requests: the one given, or the lines of the file."""
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give exactly one of `prompt` and `prompt_file`.")
        return read_requests(self.prompt, self.prompt_file)

    def generation_options(self) -> dict[str, Any]:
        """Fields of `PDTGenerationConfig` that were given."""
        return {name: getattr(self, name) for name in generation_fields() if getattr(self, name) is not None}

    def generate_arguments(self, num_streams: int | None = None) -> dict[str, Any]:
        """
        Keyword arguments of `generate`.

        Args:
            num_streams (`int`, *optional*): S of the model, for a call that chooses none.

        Raises:
            ValueError: For options that contradict each other, or files of another form.
        """
        num_streams = self.num_streams or num_streams
        if self.headers is not None and num_streams not in (None, len(self.headers)):
            raise ValueError(
                f"headers={self.headers}, allowed: one per stream, num_streams={num_streams}; got {len(self.headers)}."
            )
        if self.headers is not None and self.stream_prefixes is not None:
            raise ValueError("give at most one of `headers` and `stream_prefixes`.")
        prefixes = self.headers and [render_header(header) for header in self.headers]
        return {
            "plan": None if self.plan == "none" else self.plan,
            "plan_texts": self.plan_texts,
            "plan_contract": self.plan_contract and load_yaml(self.plan_contract),
            "stream_prefixes": prefixes or self.stream_prefixes,
            "seed_texts": self.seed_texts,
            "seed_notes": self.seed_notes and read_seed_notes(self.seed_notes),
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "interventions": make_interventions(self.interventions),
            "seed": self.seed,
            **sampling_options(self.temperature, self.top_k, self.top_p),
            **self.generation_options(),
            **({} if num_streams is None else {"num_streams": num_streams}),
        }
