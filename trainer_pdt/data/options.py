"""Options of a dataset build, one dataclass per stage: a change redoes that stage and those after it."""

from dataclasses import dataclass, field
from typing import Any, Literal

DROPPED_HEADERS = (
    *("references", "external links", "see also", "further reading", "bibliography", "sources", "footnotes"),
)


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _check(options: Any, low: float, high: float | None, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value < low or (high is not None and value > high):
            limit = f">= {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"`{name}` is {value!r}, must be {limit}.")


@dataclass
class BuildOptions:
    """
    Where documents come from, who plans and notes them, and where the dataset goes. `workers` changes no byte.

    Args:
        sources (`list[dict]`): One mapping per source: `kind` and the fields of that source.
        output_dir (`str`): Folder of the build; the dataset is its sub-folder `dataset`.
        teacher (`str`): ``"procedural"``, or another teacher's name.
        teacher_options (`dict`): Its fields.
        workers (`int`, *optional*, defaults to 1): Processes.
        dry_run (`bool`, *optional*, defaults to `False`): Only the first stage, then what the teacher would use.
    """

    sources: list[dict[str, Any]] = field(metadata={"help": "One mapping per source: kind and its fields."})
    output_dir: str = field(metadata={"help": "Folder of the build."})
    teacher: str = _field("procedural", "Who plans and takes notes.")
    teacher_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of the teacher."})
    workers: int = _field(1, "Processes; changes no byte of the result.")
    dry_run: bool = _field(False, "Only preflight, then what the teacher would use.")

    def __post_init__(self) -> None:
        _check(self, 1, None, "workers")
        if not self.sources:
            raise ValueError("`sources` is empty, must hold at least one source.")


@dataclass
class PreflightOptions:
    """
    Which documents are worth a teacher's time.

    Args:
        shard_size (`int`, *optional*, defaults to 500): Source rows per shard, in all stages.
        max_document_bytes (`int`, *optional*, defaults to 5,000,000): Longest source row; longer ones are never in
            memory.
        min_words (`int`, *optional*, defaults to 30), max_words (`int`, *optional*, defaults to 25,000): Of the text.
        max_control_ratio (`float`, *optional*, defaults to 0.01): Share of control characters; fewer are removed.
        max_non_latin_ratio (`float`, *optional*, defaults to 0.3): Share of letters outside the Latin script; 1 for
            documents in any language.
        drop_headers (`list[str]`): Sections that are left out, by header without case.
        near_duplicates (`str`, *optional*, defaults to `"reject"`): ``"keep"`` keeps them together in one split.
        near_duplicate_similarity (`float`, *optional*, defaults to 0.8): Share of common shingles of near duplicates.
    """

    shard_size: int = _field(500, "Source rows per shard.")
    max_document_bytes: int = _field(5_000_000, "Longest source row.")
    min_words: int = _field(30, "Fewest words of a text.")
    max_words: int = _field(25_000, "Most words of a text.")
    max_control_ratio: float = _field(0.01, "Share of control characters.")
    max_non_latin_ratio: float = _field(0.3, "Share of letters outside the Latin script.")
    drop_headers: list[str] = field(
        default_factory=lambda: [*DROPPED_HEADERS], metadata={"help": "Sections that are left out."}
    )
    near_duplicates: Literal["reject", "keep"] = _field("reject", "keep = together in one split.")
    near_duplicate_similarity: float = _field(0.8, "Share of common shingles of near duplicates.")

    def __post_init__(self) -> None:
        _check(self, 1, None, "shard_size", "max_document_bytes", "min_words")
        _check(self, self.min_words, None, "max_words")
        _check(self, 0, 1, "max_control_ratio", "max_non_latin_ratio", "near_duplicate_similarity")


@dataclass
class PlanOptions:
    """
    How strict plans are checked.

    Args:
        plan_lint (`str`, *optional*, defaults to `"fail"`): Two streams that plan the same item or have the same
            header: ``"fail"`` rejects the document, ``"warn"`` counts it, ``"ignore"`` does not look.
    """

    plan_lint: Literal["fail", "warn", "ignore"] = _field("fail", "Two streams that plan the same.")


@dataclass
class NotesOptions:
    """
    Snapshots, and noisy variants of the true notes.

    Args:
        round_words (`int`, *optional*, defaults to 9): Words per round, for snapshots and readiness: about 0.75 times
            the tokens of a block.
        max_snapshots (`int`, *optional*, defaults to 32): Most snapshots of a section, evenly spread over its rounds.
        noisy_variants (`int`, *optional*, defaults to 3): Noisy notes per section.
        noisy_paraphrase (`float`, *optional*, defaults to 0.15): Probability that a fact is told in other words.
        noisy_drop (`float`, *optional*, defaults to 0.05): Probability that a fact is lost.
        noisy_hallucinate (`float`, *optional*, defaults to 0.05): Probability that a fact gets another value.
        noisy_shuffle (`bool`, *optional*, defaults to `True`): Facts in any order.
        noisy_seed (`int`, *optional*, defaults to 0): Seed; draws depend on it and on the document only.
    """

    round_words: int = _field(9, "Words per round.")
    max_snapshots: int = _field(32, "Most snapshots of a section.")
    noisy_variants: int = _field(3, "Noisy notes per section.")
    noisy_paraphrase: float = _field(0.15, "Probability that a fact is told in other words.")
    noisy_drop: float = _field(0.05, "Probability that a fact is lost.")
    noisy_hallucinate: float = _field(0.05, "Probability that a fact gets another value.")
    noisy_shuffle: bool = _field(True, "Facts in any order.")
    noisy_seed: int = _field(0, "Seed of the noise.")

    def __post_init__(self) -> None:
        _check(self, 1, None, "round_words", "max_snapshots")
        _check(self, 0, None, "noisy_variants")
        _check(self, 0, 1, "noisy_paraphrase", "noisy_drop", "noisy_hallucinate")


@dataclass
class SplitOptions:
    """
    Quality checks, then splits by document.

    Args:
        validation_fraction (`float`, *optional*, defaults to 0.1), test_fraction (`float`, *optional*, defaults to
            0.1): Expected shares; a document's split follows from its id and the seed, so that more documents never
            move others.
        split_seed (`int`, *optional*, defaults to 0): Seed.
        min_section_words (`int`, *optional*, defaults to 5): Fewest words of a section.
        max_length_ratio (`float`, *optional*, defaults to 4.0): Longest section over the shortest, in words.
        min_stated_items (`float`, *optional*, defaults to 0.5): Least share of plan items that a section states.
        audit_fraction (`float`, *optional*, defaults to 0.01): Share of documents written out for reading.
    """

    validation_fraction: float = _field(0.1, "Expected share of validation documents.")
    test_fraction: float = _field(0.1, "Expected share of test documents.")
    split_seed: int = _field(0, "Seed of the splits.")
    min_section_words: int = _field(5, "Fewest words of a section.")
    max_length_ratio: float = _field(4.0, "Longest section over the shortest.")
    min_stated_items: float = _field(0.5, "Least share of stated plan items.")
    audit_fraction: float = _field(0.01, "Share of documents written out for reading.")

    def __post_init__(self) -> None:
        _check(self, 0, 1, "validation_fraction", "test_fraction", "min_stated_items", "audit_fraction")
        _check(self, 0, 1 - self.validation_fraction, "test_fraction")
        _check(self, 1, None, "min_section_words", "max_length_ratio")


@dataclass
class ExportOptions:
    """
    The published dataset.

    Args:
        dataset_name (`str`, *optional*, defaults to `"Parallel sections"`): Title of the card.
        dataset_license (`str`, *optional*, defaults to `"other"`): Of the documents, as the Hub spells it.
        dataset_language (`list[str]`): Language codes for the card.
        section_orders (`int`, *optional*, defaults to 0): Copies of every training document with its sections in
            another order.
        section_order_seed (`int`, *optional*, defaults to 0): Seed of the orders.
        save_arrow (`bool`, *optional*, defaults to `False`): Also write `dataset_arrow` for `load_from_disk`.
        save_kd_jsonl (`bool`, *optional*, defaults to `False`): Also write `dataset_kd`, one JSON record per stream in
            the form of the original system, without its token ids and vectors.
        push_to_hub (`bool`, *optional*, defaults to `False`): Upload the folder `dataset`.
        hub_dataset_id (`str`, *optional*): Repository; needed for pushing.
        hub_private (`bool`, *optional*, defaults to `True`): Visibility of a new repository.
    """

    dataset_name: str = _field("Parallel sections", "Title of the card.")
    dataset_license: str = _field("other", "Licence of the documents.")
    dataset_language: list[str] = field(
        default_factory=lambda: ["en"], metadata={"help": "Language codes for the card."}
    )
    section_orders: int = _field(0, "Copies of training documents in other section orders.")
    section_order_seed: int = _field(0, "Seed of the orders.")
    save_arrow: bool = _field(False, "Also write dataset_arrow for load_from_disk.")
    save_kd_jsonl: bool = _field(False, "Also write dataset_kd, one JSON record per stream.")
    push_to_hub: bool = _field(False, "Upload the dataset.")
    hub_dataset_id: str | None = _field(None, "Repository.")
    hub_private: bool = _field(True, "Visibility of a new repository.")

    def __post_init__(self) -> None:
        _check(self, 0, None, "section_orders")
        if self.push_to_hub and not self.hub_dataset_id:
            raise ValueError("`push_to_hub` is set without `hub_dataset_id`, must be `owner/name`.")


OPTIONS = (BuildOptions, PreflightOptions, PlanOptions, NotesOptions, SplitOptions, ExportOptions)
"""Options of a build, one class per stage, in the order that `DatasetBuilder` takes them."""
