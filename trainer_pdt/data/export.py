"""Fifth stage: the published dataset as a folder that `load_dataset` and the Hub take."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, DatasetInfo
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from .augmentation import other_orders
from .kd_records import kd_records
from .options import ExportOptions
from .publish import DOCUMENT_FEATURES, document_from_row
from .quality import QualityMeasures
from .quality_report import AUDIT_OPENING, audit_markdown, listed, report_markdown
from .runner import Mapper, shard_input
from .splits import SPLITS
from .storage import (
    MANIFEST_FILE,
    TEMPORARY,
    clear_parts,
    file_digest,
    fingerprint,
    read_json,
    read_parquet,
    read_shard,
    write_json,
    write_parquet,
    write_text,
)

DATASET_FOLDER, ARROW_FOLDER, KD_FOLDER, DATA_FOLDER = "dataset", "dataset_arrow", "dataset_kd", "data"
MARKER_FILE = "built_from.json"
REPORT_FILE, REPORT_PAGE, AUDIT_FILE, CARD_FILE = "quality_report.json", "quality_report.md", "audit.md", "README.md"
STAGES = ("preflight", "plans", "notes", "splits")


@dataclass(frozen=True)
class _Part:
    """What one shard adds to the export: rows, bytes and measures per split, documents to read."""

    rows: dict[str, int]
    sizes: dict[str, int]
    measures: dict[str, QualityMeasures]
    audit: str


@dataclass(frozen=True)
class Export:
    """
    Writes the dataset. It is there whole or not at all.

    Args:
        root (`Path`): Folder of the build.
        options ([`ExportOptions`]): Name, licence, augmentation.
        card_template (`Path`): Jinja template of the card.
    """

    version: ClassVar[int] = 2

    root: Path
    options: ExportOptions
    card_template: Path

    @property
    def folder(self) -> Path:
        """The dataset."""
        return self.root / DATASET_FOLDER

    def run(self, num_shards: int, mapper: Mapper) -> Path:
        """Makes the dataset if it is missing or made of something else."""
        clear_parts(self.root)
        made_from = self._input(num_shards)
        if not _is_whole(self.folder, made_from):
            part = self.root / f"{TEMPORARY}{DATASET_FOLDER}"
            (part / DATA_FOLDER).mkdir(parents=True)
            self._write(part, num_shards, mapper, made_from)
            shutil.rmtree(self.folder, ignore_errors=True)
            part.rename(self.folder)
        self._beside(ARROW_FOLDER, self.options.save_arrow, made_from, self._write_arrow)
        self._beside(KD_FOLDER, self.options.save_kd_jsonl, made_from, self._write_kd)
        return self.folder

    def _input(self, num_shards: int) -> str:
        hidden = ("push_to_hub", "hub_private", "save_arrow", "save_kd_jsonl")
        options = {name: value for name, value in asdict(self.options).items() if name not in hidden}
        setting = {"version": self.version, "options": options, "card": file_digest(self.card_template)}
        return fingerprint([shard_input(setting, self.root, ("notes", "splits"), n) for n in range(num_shards)])

    def _write(self, part: Path, num_shards: int, mapper: Mapper, made_from: str) -> None:
        parts = mapper(partial(self._write_shard, part / DATA_FOLDER), range(num_shards))
        rows = {split: _number_files(part / DATA_FOLDER, split, parts) for split in SPLITS}
        stages = {name: read_json(self.root / name / MANIFEST_FILE) for name in STAGES}
        check_splits(rows, stages)
        measures = {split: QualityMeasures() for split in SPLITS if rows[split]}
        for shard in parts:
            for split, found in shard.measures.items():
                measures[split].update(found)
        steps = {name: {key: stages[name][key] for key in ("rows", "rejects", "counts")} for name in STAGES}
        report = {"stages": steps, "splits": {split: found.report() for split, found in measures.items()}}
        write_json(part / REPORT_FILE, report)
        write_text(part / REPORT_PAGE, report_markdown(report))
        write_text(part / AUDIT_FILE, AUDIT_OPENING + "".join(shard.audit for shard in parts))
        write_text(part / CARD_FILE, self._card(part, rows, parts, report))
        files = sorted(path for path in part.rglob("*") if path.is_file())
        write_json(
            part / MANIFEST_FILE,
            {
                "input": made_from,
                "rows": {split: count for split, count in rows.items() if count},
                "stages": {name: {"setting": m["setting"], "sha256": m["sha256"]} for name, m in stages.items()},
                "files": {path.relative_to(part).as_posix(): file_digest(path) for path in files},
                "sizes": {path.relative_to(part).as_posix(): path.stat().st_size for path in files},
            },
        )

    def _write_shard(self, folder: Path, number: int) -> _Part:
        """One file per split; numbered for good once all are there."""
        splits = {row["document_id"]: row for row in read_shard(self.root / "splits", number)}
        rows: dict[str, list[dict[str, Any]]] = {}
        measures: dict[str, QualityMeasures] = {}
        audit = ""
        for row in read_shard(self.root / "notes", number):
            if (found := splits.get(row["document_id"])) is None:
                continue
            document = document_from_row(row)
            measures.setdefault(found["split"], QualityMeasures()).add(document)
            rows.setdefault(found["split"], []).append(row)
            if found["split"] == "train" and self.options.section_orders:
                copies = other_orders(document, self.options.section_orders, self.options.section_order_seed)
                rows["train"] += [copy.to_dict() for copy in copies]
            if found["audit"]:
                audit += audit_markdown(document)
        sizes = {
            split: write_parquet(_shard_file(folder, split, number), found, DOCUMENT_FEATURES)
            for split, found in rows.items()
        }
        return _Part({split: len(found) for split, found in rows.items()}, sizes, measures, audit)

    def _card(self, folder: Path, rows: Mapping[str, int], parts: list[_Part], report: Mapping[str, Any]) -> str:
        splits = [
            {"name": split, "rows": count, "bytes": sum(part.sizes.get(split, 0) for part in parts)}
            for split, count in rows.items()
            if count
        ]
        card = DatasetCard.from_template(
            DatasetCardData(),
            template_path=str(self.card_template),
            dataset_name=self.options.dataset_name,
            dataset_license=self.options.dataset_license,
            languages=self.options.dataset_language,
            repo_id=self.options.hub_dataset_id,
            splits=splits,
            download_size=sum(file.stat().st_size for file in (folder / DATA_FOLDER).iterdir()),
            domains=sorted({domain for found in report["splits"].values() for domain in found["domains"]}),
            shares=report["splits"]["train"]["shares"],
            rejects={name: stage["rejects"] for name, stage in report["stages"].items() if stage["rejects"]},
        )
        return str(card)

    def _beside(self, name: str, wanted: bool, made_from: str, write: Callable[[Path, str], None]) -> None:
        """The dataset in another form, in a folder beside it: whole and of the same input, or not there."""
        target = self.root / name
        if (target / MARKER_FILE).is_file() and read_json(target / MARKER_FILE) == made_from:
            return
        shutil.rmtree(target, ignore_errors=True)
        if wanted:
            part = self.root / f"{TEMPORARY}{name}"
            write(part, made_from)
            write_json(part / MARKER_FILE, made_from)
            part.rename(target)

    def _files(self) -> dict[str, list[Path]]:
        """The parquet files of every split."""
        splits = read_json(self.folder / MANIFEST_FILE)["rows"]
        return {split: sorted((self.folder / DATA_FOLDER).glob(f"{split}-*.parquet")) for split in splits}

    def _write_arrow(self, part: Path, made_from: str) -> None:
        """For `load_from_disk`, without traces of paths or times."""
        cache = self.root / f"{TEMPORARY}cache"
        splits = {}
        for split, files in self._files().items():
            table = Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache)).data
            info = DatasetInfo(features=DOCUMENT_FEATURES)
            splits[split] = Dataset(table, info=info, fingerprint=fingerprint([made_from, split])[:16])
        DatasetDict(splits).save_to_disk(str(part))
        shutil.rmtree(cache)

    def _write_kd(self, part: Path, made_from: str) -> None:
        """A line per stream, see [`kd_records`]."""
        part.mkdir()
        for split, files in self._files().items():
            with open(part / f"kd_{split}.jsonl", "w", encoding="utf-8", newline="\n") as stream:
                for row in (row for file in files for row in read_parquet(file, self.root)):
                    for record in kd_records(document_from_row(row), split):
                        stream.write(json.dumps(record, ensure_ascii=False) + "\n")

    def push(self) -> str:
        """Has the Hub check the card, then uploads the folder; returns the address of the commit."""
        DatasetCard.load(self.folder / CARD_FILE).validate(repo_type="dataset")
        api = HfApi()
        name = str(self.options.hub_dataset_id)
        api.create_repo(name, repo_type="dataset", private=self.options.hub_private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=str(self.folder),
            repo_type="dataset",
            commit_message=f"Dataset built from {read_json(self.folder / MANIFEST_FILE)['input'][:12]}",
            delete_patterns=[f"{DATA_FOLDER}/*"],
        )
        return str(commit)


def check_splits(rows: Mapping[str, int], stages: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Training needs documents to train and to validate on.

    Args:
        rows (`Mapping`): Documents by split.
        stages (`Mapping`): Manifest by stage, quoted where documents are missing.
    """
    told = "; ".join(f"{name} {_outcome(manifest)}" for name, manifest in stages.items())
    if not any(rows.values()):
        raise ValueError(f"no document reached the dataset: {told}.")
    for split in ("train", "validation"):
        if not rows[split]:
            raise ValueError(
                f"split {split!r} has no documents (train {rows['train']}, validation {rows['validation']}, test "
                f"{rows['test']}); use more documents, another `split_seed`, or another `validation_fraction`. "
                f"By stage: {told}."
            )


def _outcome(manifest: Mapping[str, Any]) -> str:
    rejects = manifest["rejects"]
    reasons = f" ({listed(rejects)})" if rejects else ""
    return f"kept {manifest['rows']}, rejected {sum(rejects.values())}{reasons}"


def _shard_file(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-shard{number:05d}.parquet"


def _number_files(folder: Path, split: str, parts: list[_Part]) -> int:
    """Gives the files of a split their final names; returns the split's rows."""
    shards = [number for number, part in enumerate(parts) if split in part.rows]
    for place, number in enumerate(shards):
        final = folder / f"{split}-{place:05d}-of-{len(shards):05d}.parquet"
        _shard_file(folder, split, number).rename(final)
    return sum(parts[number].rows[split] for number in shards)


def _is_whole(folder: Path, made_from: str) -> bool:
    if not (folder / MANIFEST_FILE).is_file():
        return False
    manifest = read_json(folder / MANIFEST_FILE)
    sizes = {name: (folder / name).stat().st_size for name in manifest["sizes"] if (folder / name).is_file()}
    return manifest["input"] == made_from and manifest["sizes"] == sizes
