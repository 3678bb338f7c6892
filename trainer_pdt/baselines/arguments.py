"""Options of `recipes/baselines.py`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM

from ..arguments import check_whole
from ..curriculum import check_choice
from ..decode_arguments import read_requests, sampling_options
from .eagle import EagleHead
from .lookahead import LookaheadOptions
from .medusa import MedusaHeads
from .methods import METHODS, Tools
from .skeleton import Router

NEED_FILES = {"assistant": "assistant_model", "medusa": "medusa_heads", "eagle": "eagle_head"}
"""Methods that need a model of their own, and the option that names it."""


@dataclass(kw_only=True)
class BaselineArguments:
    """What is answered, in which ways, and how tokens are chosen."""

    model: str = field(metadata={"help": "Folder or Hub repository of trained adapters."})
    output_folder: str = field(default="build/baselines", metadata={"help": "Receives tables and manifests."})
    methods: list[str] = field(
        default_factory=lambda: [name for name in METHODS if name not in NEED_FILES],
        metadata={"help": "Ways of answering, sequential among them."},
    )
    prompt: str | None = field(default=None, metadata={"help": "The request; missing = documents of the worlds."})
    prompt_file: str | None = field(default=None, metadata={"help": "File with one request per line."})
    documents: int = field(default=24, metadata={"help": "Held-out documents, where no request is given."})
    max_new_tokens: int = field(default=110, metadata={"help": "Tokens per section."})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token."})
    top_k: int = field(default=0, metadata={"help": "Sample from the likeliest tokens only; 0 for all."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    seed: int = field(default=0, metadata={"help": "The same seed writes the same answers."})
    router: Router = field(default="none", metadata={"help": "Of Skeleton-of-Thought: none, or ask the trunk."})
    prompt_lookup_num_tokens: int = field(default=8, metadata={"help": "Longest draft of prompt_lookup."})
    assistant_model: str | None = field(
        default=None, metadata={"help": "Folder or repository of the smaller model that the method assistant needs."}
    )
    lookahead_window: int = field(default=5, metadata={"help": "Columns of lookahead's window."})
    lookahead_ngram: int = field(default=4, metadata={"help": "Tokens of lookahead's n-grams."})
    lookahead_guesses: int = field(default=5, metadata={"help": "N-grams that lookahead drafts at a time."})
    medusa_heads: str | None = field(
        default=None, metadata={"help": "Folder of recipes/train_drafts.py that the method medusa needs."}
    )
    eagle_head: str | None = field(default=None, metadata={"help": "The same for the method eagle."})
    eagle_length: int = field(default=4, metadata={"help": "Tokens that eagle drafts one after another."})
    device: str | None = field(default=None, metadata={"help": "Of the model: cuda, cuda:1, mps; default: the CPU."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})

    def __post_init__(self) -> None:
        for name in self.methods:
            check_choice("methods", name, tuple(METHODS))
        if "sequential" not in self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods={self.methods}, allowed: different ones, sequential among them.")
        for name, needed in NEED_FILES.items():
            if (getattr(self, needed) is None) == (name in self.methods):
                raise ValueError(
                    f"{needed}={getattr(self, needed)!r}, allowed: a model with method {name!r}, else none."
                )
        for name in ("documents", "max_new_tokens", "prompt_lookup_num_tokens", "eagle_length"):
            check_whole(name, getattr(self, name), 1)
        if self.threads is not None:
            check_whole("threads", self.threads, 1)
        sampling_options(self.temperature, self.top_k, self.top_p)
        self.lookahead()
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("give at most one of `prompt` and `prompt_file`.")

    def requests(self) -> list[str]:
        """The requests given; none = the worlds' documents."""
        return read_requests(self.prompt, self.prompt_file)

    def lookahead(self) -> LookaheadOptions:
        """Sizes of lookahead decoding."""
        return LookaheadOptions(self.lookahead_window, self.lookahead_ngram, self.lookahead_guesses)

    def tools(self) -> Tools:
        """What single methods are given, models loaded."""
        assistant = None
        if self.assistant_model is not None:
            assistant = AutoModelForCausalLM.from_pretrained(self.assistant_model, device_map=self.device).eval()
        return Tools(
            router=self.router,
            prompt_lookup_num_tokens=self.prompt_lookup_num_tokens,
            assistant=assistant,
            lookahead=self.lookahead(),
            medusa=self.medusa_heads and MedusaHeads.from_pretrained(self.medusa_heads).eval(),
            eagle=self.eagle_head and EagleHead.from_pretrained(self.eagle_head).eval(),
            eagle_length=self.eagle_length,
        )

    def generate_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        sampling = sampling_options(self.temperature, self.top_k, self.top_p)
        return {"max_new_tokens": self.max_new_tokens, "seed": self.seed, **sampling}
