"""Sections of an evaluation with the text given: what notes change in the probability of each token.

Letters: B documents, M supervised tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modeling_pdt import PDTOutput, Rollout

from ..branches import Targets, build_rollout, build_targets, reread, silence
from ..collator import PDTDataCollator
from ..data.counting import bootstrap_rate
from ..data.schema import Document
from ..losses import supervised_positions, supervised_values, token_ce, token_kl
from ..teacher import true_rollout
from .documents import held_out_documents
from .modes import batches
from .scoring import rate_dict

if TYPE_CHECKING:
    from .suite import Evaluation

DOCUMENTS_AT_ONCE = 16
NOTES = "notes"
"""The condition that the others are held against: notes as decoding writes them."""


@dataclass(frozen=True)
class GivenText:
    """
    A batch of documents as the model reads them.

    Args:
        inputs (`Mapping`): From the collator.
        rollout (`Rollout`): The bus of decoding.
        targets ([`~trainer_pdt.branches.Targets`]): What follows, by supervised token.
        output (`PDTOutput`): Of the model, with logits `[M, V]`.
        trunk_MV (`Tensor`): Logits of the trunk alone.
        document_M (`LongTensor`): Document of each supervised token, in the batch.
        documents (`int`): How many there are.
    """

    inputs: Mapping[str, Any]
    rollout: Rollout
    targets: Targets
    output: PDTOutput
    trunk_MV: Tensor
    document_M: Tensor
    documents: int


@torch.no_grad()
def read_documents(evaluation: "Evaluation", documents: Sequence[Document]) -> Iterator[GivenText]:
    """The documents in batches, read with the bus of decoding and by the trunk alone."""
    model = evaluation.model
    collator = PDTDataCollator.from_config(model.config, evaluation.tokenizer)
    for batch in batches(documents, DOCUMENTS_AT_ONCE):
        inputs = collator([evaluation.features(document) for document in batch])
        rollout = build_rollout(inputs, model.config)
        wanted = supervised_positions(inputs["labels"])
        names = ("input_ids", "attention_mask", "position_ids", "stream_ids")
        output = model(**{name: inputs[name] for name in names}, rollout=rollout, logits_mask=wanted)
        trunk_MV = model(tap=output.tap, logits_mask=wanted).logits
        document_M = wanted.nonzero()[:, 0] // rollout.num_streams
        targets = build_targets(inputs, rollout, 1.0)
        yield GivenText(inputs, rollout, targets, output, trunk_MV, document_M, len(batch))


def text(evaluation: "Evaluation") -> dict[str, Any]:
    """
    Section `text_ce`: cross-entropy and divergence from the trunk on tokens that are no sibling facts; under `told`
    the same where an owner states what a note of a sibling has told before.
    """
    kinds: dict[str, list[list[float]]] = {"other": [], "told": []}
    for read in read_documents(evaluation, evaluation.documents):
        owned_M = supervised_values(read.inputs["own_mask"], read.inputs["labels"])
        kinds["other"] += _by_document(read, ~read.targets.sibling_M)
        kinds["told"] += _by_document(read, read.targets.feasible_M & owned_M)
    measures = {name: _against_trunk(sums) for name, sums in kinds.items() if any(count for *_, count in sums)}
    return measures["other"] | ({"told": measures["told"]} if "told" in measures else {})


def _by_document(read: GivenText, chosen_M: Tensor) -> list[list[float]]:
    """Per document the sums of PDT's and the trunk's cross-entropy and of their divergence, and the tokens summed."""
    pdt_MV, trunk_MV, tokens_M = read.output.logits[chosen_M], read.trunk_MV[chosen_M], read.targets.tokens_M[chosen_M]
    values = (
        *(token_ce(logits, tokens_M) for logits in (pdt_MV, trunk_MV)),
        token_kl(pdt_MV, trunk_MV),
        torch.ones(len(tokens_M)),
    )
    blank, document_M = torch.zeros(read.documents, dtype=torch.float64), read.document_M[chosen_M]
    return torch.stack([blank.index_add(0, document_M, v.double()) for v in values], dim=1).tolist()


def _against_trunk(sums: Sequence[Sequence[float]]) -> dict[str, Any]:
    pdt, trunk, divergence, count = (sum(column) for column in zip(*sums, strict=True))
    return {
        "pdt": pdt / count,
        "trunk": trunk / count,
        "kl": divergence / count,
        "divergence": rate_dict(bootstrap_rate((kl, int(tokens)) for *_, kl, tokens in sums)),
        "excess": rate_dict(bootstrap_rate((mine - its, int(tokens)) for mine, its, _, tokens in sums)),
        "tokens": int(count),
    }


def _other_notes(read: GivenText) -> Rollout:
    """Every document reads the notes of the next one in the batch."""
    rows = read.inputs["input_ids"].shape[0]
    return replace(read.rollout, donor_R=torch.arange(rows).roll(-read.rollout.num_streams))


CONDITIONS: dict[str, Callable[[GivenText], Rollout]] = {
    "true_notes": lambda read: true_rollout(read.inputs, read.rollout),
    "no_notes": lambda read: silence(read.rollout),
    "zero_notes": lambda read: replace(read.rollout, perturbation_RVKN=-read.output.speculation),
    "other_notes": _other_notes,
}
"""What is on the bus in the place of the notes that decoding writes."""


def dependency_measures(
    losses: Mapping[str, Sequence[Sequence[float]]], depends: Sequence[Sequence[bool]]
) -> dict[str, dict[str, Any]]:
    """
    Cross-entropy of tokens that depend on a sibling and of those that do not, by condition, and what notes gain.

    Args:
        losses (`Mapping[str, Sequence[Sequence[float]]]`): By condition, per document, cross-entropy of each token in
            nats; `"notes"` is the condition that the others are held against.
        depends (`Sequence[Sequence[bool]]`): Per document, whether each token depends on a sibling.

    Returns:
        `dict`: `dependency` and `non_dependency`, mean cross-entropy by condition; `dependency_gain` and
        `non_dependency_gain`, by other condition how much lower it is with `"notes"`. Values are
        `{mean, low, high, n}`, intervals resample documents, `n` counts tokens.

    Raises:
        ValueError: When `"notes"` is missing, or a document has not as many losses as tokens.
    """
    if NOTES not in losses:
        raise ValueError(f"losses has the conditions {sorted(losses)}, allowed: {NOTES!r} and others.")
    for name, documents in losses.items():
        if [len(document) for document in documents] != [len(document) for document in depends]:
            raise ValueError(f"losses of {name!r} must hold one number per token of `depends`, document by document.")
    found: dict[str, dict[str, Any]] = {}
    for kind, wanted in (("dependency", True), ("non_dependency", False)):
        sums = {
            name: [
                (sum(ce for ce, it in zip(*pair, strict=True) if it == wanted), sum(it == wanted for it in pair[1]))
                for pair in zip(documents, depends, strict=True)
            ]
            for name, documents in losses.items()
        }
        found[kind] = {name: rate_dict(bootstrap_rate(pairs)) for name, pairs in sums.items()}
        found[f"{kind}_gain"] = {
            name: rate_dict(
                bootstrap_rate((ce - own, count) for (ce, count), (own, _) in zip(pairs, sums[NOTES], strict=True))
            )
            for name, pairs in sums.items()
            if name != NOTES
        }
    return found


def dependency(evaluation: "Evaluation") -> dict[str, Any]:
    """
    Section `dependency_ce`: [`dependency_measures`] under [`CONDITIONS`] and of the trunk alone.

    A token depends on a sibling where it repeats a fact that a visible note can have told; repeated facts that no note
    can have told are left out. A batch of one document has no other one's notes, and is left out of all conditions.
    """
    arguments = evaluation.arguments
    documents = held_out_documents("test", arguments.core_documents, arguments.hard_documents, with_notes=True)
    losses: dict[str, list[list[float]]] = {name: [] for name in (NOTES, "trunk", *CONDITIONS)}
    depends: list[list[bool]] = []
    for read in read_documents(evaluation, documents):
        if read.documents < 2:
            continue
        counted_M = read.targets.feasible_M | ~read.targets.sibling_M
        places = [counted_M & (read.document_M == number) for number in range(read.documents)]
        logits = {NOTES: read.output.logits, "trunk": read.trunk_MV}
        for name, documents_so_far in losses.items():
            logits_MV = logits.get(name)
            if logits_MV is None:
                logits_MV = reread(evaluation.model, read.inputs, read.output.tap, CONDITIONS[name](read))
            ce_M = token_ce(logits_MV, read.targets.tokens_M)
            documents_so_far += [ce_M[place_M].tolist() for place_M in places]
        depends += [read.targets.feasible_M[place_M].tolist() for place_M in places]
    return dependency_measures(losses, depends)
