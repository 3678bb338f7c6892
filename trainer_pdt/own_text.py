"""Documents as a model itself writes them, judged by the parser of the procedural worlds: a data view of training."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_pdt import PDTForParallelDecoding

from .callbacks import parameter_group
from .collator import PDTDataCollator
from .curriculum import WRITING_GROUPS
from .data.counting import StreamText
from .data.schema import Document
from .evaluation.blocks import document_from_texts, traced_features
from .evaluation.modes import write_parallel
from .features import FeatureMaker
from .telemetry import fingerprint, read_json, write_json


class OwnText:
    """
    Sections that the model writes for training documents, free-running at temperature 1 and without the commit gate.

    They depend on the weights that write, the document and the seed. A stage on own text trains none of these weights,
    so that what was written stays the model's own for the whole stage, and each text is written once and kept on disk:
    a run that goes on reads what it had read. Processes share the folder; files appear complete or not at all.

    Args:
        folder (`str` or `Path`): Gets a folder per state of the weights that write, with a file per document.
        model (`PDTForParallelDecoding`): The unwrapped model.
        features (`FeatureMaker`), collator (`PDTDataCollator`): Make the batch.
        seed (`int`): Of sampling.
    """

    def __init__(
        self,
        folder: str | Path,
        model: PDTForParallelDecoding,
        features: FeatureMaker,
        collator: PDTDataCollator,
        seed: int,
    ) -> None:
        self.folder, self.model, self.seed = Path(folder), model, seed
        self.features = replace(features, corruption_rate=0.0)
        self.collator = replace(collator, with_corrupted=False)
        self._stage: tuple[str, Path] | None = None

    def batch(self, documents: Sequence[Document], stage: str) -> dict[str, Tensor]:
        """
        The view of the collator in which the sections are the model's own. As in the corrupted view, tokens of a value
        have no label where it contradicts what a sibling has stated by the end of the block.

        Args:
            documents (`Sequence[Document]`): Whose plans are written.
            stage (`str`): Name of the stage in force; with another one, the weights are looked at again.
        """
        if self._stage is None or self._stage[0] != stage:
            self._stage = stage, self.folder / writing_digest(self.model, self.seed)[:16]
        texts = self._texts(documents, self._stage[1])
        views = [self._features(document, sections) for document, sections in zip(documents, texts, strict=True)]
        batch = self.collator(views)
        source, now, labels = batch["source_round"], batch["write_round"], batch["labels"]
        known = (source <= now) & (source > now - self.collator.bus_capacity)
        unknown = (batch["reference"] >= 0) & ~known
        batch["labels"] = torch.where(unknown, batch["input_ids"], labels)
        return batch

    def _features(self, document: Document, sections: Sequence[str]) -> dict[str, Any]:
        texts = [StreamText(section) for section in sections]
        made = traced_features(self.features, document_from_texts(document, texts))
        view = made["clean"]
        facts = zip(view["reference"], view["contradicts"], strict=True)
        planted = [[number >= 0 and wrong[number] for number in numbers] for numbers, wrong in facts]
        return {**made, "clean": {**view, "planted": planted}}

    def _texts(self, documents: Sequence[Document], folder: Path) -> list[list[str]]:
        files = [folder / f"{document.document_id}.json" for document in documents]
        missing = {file: document for file, document in zip(files, documents, strict=True) if not file.is_file()}
        if missing:
            for file, sections in zip(missing, self._write(list(missing.values())), strict=True):
                write_json(file, {"sections": sections})
        return [read_json(file)["sections"] for file in files]

    def _write(self, documents: Sequence[Document]) -> list[list[str]]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.autocast(self.model.device.type, enabled=False):
                written = write_parallel(
                    self.model,
                    self.features.tokenizer,
                    documents,
                    batch_size=len(documents),
                    seed=self.seed,
                    agreement_threshold=None,
                )
        finally:
            self.model.train(training)
        return [[section.text for section in sections] for sections in written.texts]


def writing_digest(model: PDTForParallelDecoding, seed: int) -> str:
    """Names the model's configuration, the trained weights that a text depends on, and the seed of its sampling."""
    digest = hashlib.sha256(fingerprint([model.config.to_dict(), seed]).encode())
    for name, parameter in sorted(model.pdt_parameters().items()):
        if parameter_group(name) in WRITING_GROUPS:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
