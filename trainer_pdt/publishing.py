"""A release: model, tokenizer, card, evaluation, provenance and check sums, staged as files before any upload."""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from hub_cards import template_path
from modeling_pdt import PDTForParallelDecoding

from .evaluation.sections import adapters_mark
from .evaluation.values import measure, part
from .loading import load_trained
from .render import HARMONY_FINAL, render_request
from .telemetry import (
    MANIFEST_FILE,
    REPORT_FILE,
    STAGE_HISTORY_FILE,
    THRESHOLD_HEADS,
    fingerprint,
    git_state,
    package_versions,
    read_json,
    write_json,
)

logger = logging.getLogger(__name__)

PROVENANCE_FILE, EVALUATION_FILE, SUMS_FILE = "provenance.json", "evaluation.json", "SHA256SUMS"
# An absolute path of two parts or more, at the start of a word.
_PATH = re.compile(r"(?<![^\s'\"=(,])(?:/|~/|[A-Za-z]:\\)(?:[^\s'\"/\\]+[/\\])+([^\s'\"/\\]*)")
# Metric type, name on the card, place in evaluation.json.
METRICS = (
    ("sibling_fact_recall", "sibling-fact recall", ("sibling_fact_recall", "pdt")),
    ("sibling_fact_recall_core", "sibling-fact recall, core documents", ("sibling_fact_recall", "pdt_core")),
    ("sibling_fact_recall_bus_off", "sibling-fact recall, bus off", ("sibling_fact_recall", "ablated")),
    ("sibling_fact_recall_sequential", "sibling-fact recall, sequential", ("sibling_fact_recall", "sequential")),
    ("coverage_precision", "coverage precision", ("coverage", "precision")),
    ("coverage_recall", "coverage recall", ("coverage", "recall")),
    ("agreement_auroc", "agreement AUROC", ("agreement", "auroc")),
    ("false_rollback", "sound blocks withdrawn", ("agreement", "false_rollback")),
    ("trunk_kl", "text KL to the trunk", ("text_ce", "kl")),
    ("parallel_speedup", "speed-up over one stream that writes the same tokens", ("speed", "parallel_vs_single")),
)
FACTS = (
    *("num_streams", "notes_dim", "notes_per_block", "instrumented_layers", "writer_tap"),
    *("block_size", "bus_lag", "bus_capacity"),
)


@dataclass
class PublishArguments:
    """
    What to publish, and where.

    Tokens are no option: they would stay in the shell's history. Use `hf auth login` or the variable `HF_TOKEN`.

    Args:
        model (`str`): Folder of a trained model, with its telemetry.
        repo_id (`str`): Repository of the Hub, made if missing.
        evaluation (`str`, *optional*): `evaluation.json` of these adapters; missing = a card without figures.
        include_trunk (`bool`): Upload the trunk too; needed where it is no model of the Hub.
        staging_folder (`str`): The release is made here, in a folder named as the repository; emptied first.
        dry_run (`bool`): Show every file and the card; upload nothing.
        private (`bool`, *optional*): Visibility of a new repository; missing = the owner's default.
        revision (`str`, *optional*): Branch, made if missing; missing = the main branch.
        commit_message (`str`): Of the upload.
        license (`str`): Identifier of the licence of the adapters.
        language, datasets, tags, limits (`list[str]`): For the card; `limits` are sentences.
    """

    model: str = field(metadata={"help": "Folder of a trained model, with its telemetry."})
    repo_id: str = field(metadata={"help": "Repository of the Hub, made if missing."})
    evaluation: str | None = field(default=None, metadata={"help": "evaluation.json of this model."})
    include_trunk: bool = field(default=False, metadata={"help": "Upload the trunk too."})
    staging_folder: str = field(default="build/release", metadata={"help": "The release is made here."})
    dry_run: bool = field(default=False, metadata={"help": "Show files and card; upload nothing."})
    private: bool | None = field(default=None, metadata={"help": "Visibility of a new repository."})
    revision: str | None = field(default=None, metadata={"help": "Branch, made if missing."})
    commit_message: str = field(default="Publish PDT adapters", metadata={"help": "Of the upload."})
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the adapters."})
    language: list[str] = field(default_factory=lambda: ["en"], metadata={"help": "Languages of the card."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Datasets of the Hub for the card."})
    tags: list[str] = field(default_factory=list, metadata={"help": "Further tags of the card."})
    limits: list[str] = field(default_factory=list, metadata={"help": "Further sentences on limits."})

    def __post_init__(self) -> None:
        if not os.path.isdir(self.model):
            raise ValueError(f"model={self.model!r}, allowed: the folder of a trained model.")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id):
            raise ValueError(f"repo_id={self.repo_id!r}, allowed: owner/name.")
        for name in ("model", "evaluation"):
            path = getattr(self, name)
            if path is not None and Path(path).resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(
                    f"staging_folder={self.staging_folder!r}, allowed with {name}={path!r}: one that does not hold "
                    f"it in {self.folder}, which is emptied."
                )

    @property
    def folder(self) -> Path:
        """Where this release is staged."""
        return Path(self.staging_folder) / self.repo_id.replace("/", "--")


def stage_release(arguments: PublishArguments, license_file: Path | None = None) -> Path:
    """
    Makes the release: the model is loaded, checked and saved anew, so nothing else of its folder gets out.

    Args:
        arguments ([`PublishArguments`]): What to publish.
        license_file (`Path`, *optional*): Copied as `LICENSE`.

    Returns:
        `Path`: The folder, ready for [`modeling_pdt.hub_layout.upload`].

    Raises:
        ValueError: For a model that does not load, does not condition, or names a trunk that nobody else has, and for
            an evaluation of other adapters.
    """
    model, tokenizer = load_trained(arguments.model)
    model.check_conditioning()
    if not arguments.include_trunk and os.path.isdir(model.config.trunk_name_or_path or ""):
        raise ValueError(
            f"trunk_name_or_path={model.config.trunk_name_or_path!r} is a local folder, allowed: a Hub id, or "
            "include_trunk=true, which uploads a small trunk too."
        )
    folder = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder, include_trunk=arguments.include_trunk)
    # How it was loaded here concerns nobody else.
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)
    for name in (f"{head}_thresholds.json" for head in THRESHOLD_HEADS):
        if (Path(arguments.model) / name).is_file():
            write_json(folder / name, without_paths(read_json(Path(arguments.model) / name)))
    evaluation = {}
    if arguments.evaluation is not None:
        evaluation = read_evaluation(arguments.evaluation, model)
        write_json(folder / EVALUATION_FILE, evaluation)
    if license_file is not None:
        shutil.copyfile(license_file, folder / "LICENSE")
    plan_hash = {"salt": model.config.plan_hash_salt, "buckets": model.config.plan_vocab_size}
    described = describe_run(arguments.model, evaluation) | {"plan_hash": plan_hash}
    provenance = write_json(folder / PROVENANCE_FILE, described)
    write_card(folder, arguments, model, tokenizer, evaluation, read_json(provenance))
    write_sums(folder)
    return folder


def read_evaluation(path: str, model: PDTForParallelDecoding) -> dict[str, Any]:
    """
    Content of `evaluation.json`, without paths of this machine.

    Args:
        path (`str`): The file.
        model ([`~modeling_pdt.PDTForParallelDecoding`]): Whose figures it must hold.

    Raises:
        ValueError: For another file, and for an evaluation of other adapters.
    """
    evaluation = without_paths(read_json(path))
    if "settings" not in evaluation and not measured(evaluation):
        raise ValueError(f"evaluation={path!r}, allowed: what recipes/evaluate.py wrote.")
    evaluated, published = part(evaluation, "settings").get("adapters"), adapters_mark(model)
    if evaluated is None:
        logger.warning("evaluation=%r does not say which adapters it measured; nobody can check its figures.", path)
    elif evaluated != published:
        raise ValueError(
            f"evaluation={path!r} measured the adapters {evaluated}, allowed: an evaluation of the adapters that are "
            f"published, {published}."
        )
    return evaluation


def describe_run(model: str | Path, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """
    How the model was made, from its telemetry; what was not recorded is not there.

    Args:
        model (`str` or `Path`): Folder of a run.
        evaluation (`Mapping`): Content of `evaluation.json`, may be empty.
    """
    files = {name: Path(model) / name for name in (MANIFEST_FILE, STAGE_HISTORY_FILE, REPORT_FILE)}
    manifest, history, report = (read_json(path) if path.is_file() else {} for path in files.values())
    data = part(manifest, "config", "data")
    described = {
        "training": {
            key: manifest.get(key)
            for key in ("command", "seed", "git", "packages", "python", "config_fingerprint", "notes_schema_version")
        },
        "config": manifest.get("config"),
        "continued": manifest.get("continued"),
        "data_fingerprint": fingerprint(data) if data else None,
        "stages": history.get("stages"),
        "step": report.get("step"),
        "seconds": report.get("seconds"),
        "metrics": {kind: value for kind, _, value in measured(evaluation)},
        "published_from": {"git": git_state(), "packages": package_versions()},
    }
    described["training"] = {key: value for key, value in described["training"].items() if value is not None}
    return without_paths({key: value for key, value in described.items() if value not in (None, {}, [])})


def measured(evaluation: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Metric type, name and `{value, low, high, n}` of every metric of [`METRICS`] that `evaluation` holds."""
    found = []
    for kind, name, (*place, key) in METRICS:
        read = measure(part(evaluation, *place).get(key))
        if read is not None:
            numbers = {"value": read.mean, "low": read.low, "high": read.high}
            rounded = {key: round(number, 4) for key, number in numbers.items() if number is not None}
            found.append((kind, name, rounded | ({} if read.n is None else {"n": read.n})))
    return found


def without_paths(value: Any) -> Any:
    """JSON with the absolute paths of this machine, alone or inside a command, cut to their last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        return _PATH.sub(r"\1", value)
    return value


def write_card(
    folder: Path,
    arguments: PublishArguments,
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Path:
    """Fills the card's template from the telemetry, with the results as `model-index`, and reads it back."""
    config, training = model.config, part(provenance, "training")
    metrics, settings = measured(evaluation), part(evaluation, "settings")
    threshold = model.generation_config.agreement_threshold
    name = arguments.repo_id.split("/")[1]
    index = ModelCardData()
    if metrics:
        shared = {"task_type": "text-generation", "dataset_type": "procedural-worlds"}
        shared |= {"dataset_name": "Procedural worlds, held-out documents", "dataset_split": "test"}
        results = [
            EvalResult(**shared, metric_type=kind, metric_name=title, metric_value=numbers["value"])
            for kind, title, numbers in metrics
        ]
        index = ModelCardData(model_name=name, eval_results=results)
    trunk = config.trunk_name_or_path
    card = ModelCard.from_template(
        index,
        template_path=template_path("model_card.md"),
        base_model=None if os.path.isdir(trunk or "") or trunk == "trunk" else trunk,
        trunk_revision=config.trunk_revision,
        model_name=name,
        includes_trunk=arguments.include_trunk,
        trained_parameters=f"{sum(p.numel() for p in model.pdt_parameters().values()):,}",
        agreement_threshold=None if threshold is None else round(threshold, 4),
        metrics=[{"name": title, **numbers} for _, title, numbers in metrics],
        temperature=settings.get("temperature"),
        steps=provenance.get("step"),
        train_seconds=provenance.get("seconds"),
        git_sha=part(training, "git").get("sha"),
        data_fingerprint=provenance.get("data_fingerprint"),
        **prompt_facts(evaluation, tokenizer),
        **{key: getattr(config, key) for key in FACTS},
        **{key: getattr(arguments, key) for key in ("repo_id", "license", "language", "datasets", "tags", "limits")},
        **{key: training.get(key) for key in ("command", "seed", "config_fingerprint", "packages")},
    )
    card.save(folder / "README.md")
    read = ModelCard.load(folder / "README.md")
    if len(read.data.eval_results or []) != len(metrics):
        raise ValueError(f"the card's model-index holds {read.data.eval_results}, allowed: all of {metrics}.")
    return folder / "README.md"


def prompt_facts(evaluation: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the card's first lines of code need: a request of the evaluation, and what makes a prompt of it."""
    examples = evaluation.get("examples") or [{}]
    return {
        "request": examples[0].get("prompt"),
        "has_chat_template": tokenizer.chat_template is not None,
        "final_channel": HARMONY_FINAL if render_request("?", tokenizer).endswith(HARMONY_FINAL) else None,
    }


def write_sums(folder: Path) -> Path:
    """`SHA256SUMS` of every other file, as `sha256sum --check` reads it."""
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}"
        for name in release_files(folder)
        if name != SUMS_FILE
    ]
    (folder / SUMS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / SUMS_FILE


def release_files(folder: Path) -> list[str]:
    """Every file of a staged release, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def describe_release(folder: Path, repo_id: str) -> str:
    """What a release holds, to be read before it is uploaded: every file with its size, and the card."""
    names = release_files(folder)
    lines = [f"{repo_id}: {len(names)} files in {folder}"]
    lines += [f"{(folder / name).stat().st_size:>12,}  {name}" for name in names]
    return "\n".join([*lines, "", (folder / "README.md").read_text(encoding="utf-8")])
