"""What the agreement head shall say about each block: from contradictions, from the data, or from the model itself.

Letters: R rows, T tokens, V rounds, M supervised tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .losses import IGNORE_INDEX, supervised_values


@dataclass(frozen=True)
class AgreementLabels:
    """
    Labels of a view of the batch.

    Args:
        refused_RV (`BoolTensor`): Blocks that shall not stand.
        judged_RV (`BoolTensor`): Blocks with a label.
        refused_RT (`BoolTensor`), judged_RT (`BoolTensor`): The same of tokens.
    """

    refused_RV: Tensor
    judged_RV: Tensor
    refused_RT: Tensor
    judged_RT: Tensor


def planted_labels(inputs: Mapping[str, Tensor], disputed_RT: Tensor | None = None) -> AgreementLabels:
    """
    Judgeable blocks, refused where text and notes contradict each other.

    Args:
        inputs (`Mapping[str, Tensor]`): A view of the batch; its planted values contradict the notes.
        disputed_RT (`BoolTensor` of shape `[R, T]`, *optional*): Tokens that notes of the bus contradict.
    """
    round_RT = inputs["write_round"].clamp(min=0)
    judged_RT = (inputs["reference"] >= 0) & inputs["judgeable"].gather(1, round_RT)
    refused_RT, refused_RV = judged_RT & (inputs["labels"] == IGNORE_INDEX), inputs["contradicts"]
    if disputed_RT is not None:
        refused_RT, refused_RV = refused_RT | disputed_RT, refused_RV | _by_block(disputed_RT, inputs)
    return AgreementLabels(refused_RV, inputs["judgeable"], refused_RT, judged_RT)


def readiness_labels(inputs: Mapping[str, Tensor], planted: AgreementLabels) -> AgreementLabels:
    """
    Blocks whose repeated facts the data judges, refused where one is not ready.

    Args:
        inputs (`Mapping[str, Tensor]`): A view of the batch, with `ready` (`with_variants` of the collator).
        planted ([`AgreementLabels`]): Contradictions, which stay refused.

    Raises:
        ValueError: When the batch repeats facts and the data judges none of them.
    """
    labelled_RT, late_RT = inputs["ready"] >= 0, inputs["ready"] == 0
    if bool((inputs["reference"] >= 0).any()) and not bool(labelled_RT.any()):
        raise ValueError("agreement_labels='readiness', allowed: documents whose streams have `ready`; none has.")
    return AgreementLabels(
        _by_block(late_RT, inputs) | planted.refused_RV,
        _by_block(labelled_RT, inputs) | planted.refused_RV,
        late_RT | planted.refused_RT,
        labelled_RT | planted.refused_RT,
    )


def automatic_labels(
    inputs: Mapping[str, Tensor], planted: AgreementLabels, gain_M: Tensor, margin: float
) -> AgreementLabels:
    """
    Judgeable blocks, refused where the notes that decoding had not yet seen would have helped to write them. It is the
    block that helps; which of its tokens is not said.

    Args:
        inputs (`Mapping[str, Tensor]`): A view of the batch.
        planted ([`AgreementLabels`]): Contradictions, which stay refused.
        gain_M (`Tensor` of shape `[M]`): Cross-entropy of each supervised token with the notes of decoding's lag,
            minus that with notes of the same round too.
        margin (`float`): Nats per block above which it is refused.
    """
    labels, judged_RV = inputs["labels"], planted.judged_RV
    rows, rounds = judged_RV.shape
    round_RT = inputs["write_round"].clamp(min=0)
    place_RT = round_RT + rounds * torch.arange(rows, device=labels.device)[:, None]
    gain_X = torch.zeros(rows * rounds, device=labels.device, dtype=gain_M.dtype)
    gain_RV = gain_X.index_add(0, supervised_values(place_RT, labels), gain_M).view(rows, rounds)
    late_RV = judged_RV & (gain_RV > margin)
    passed_RT = ~late_RV.gather(1, round_RT) | planted.refused_RT
    return replace(planted, refused_RV=planted.refused_RV | late_RV, judged_RT=planted.judged_RT & passed_RT)


def _by_block(tokens_RT: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Blocks `[R, V]` that hold one of the section tokens."""
    written_RT = inputs["write_round"]
    found_RV = torch.zeros(inputs["judgeable"].shape, dtype=torch.long, device=tokens_RT.device)
    return found_RV.scatter_add(1, written_RT.clamp(min=0), (tokens_RT & (written_RT >= 0)).long()) > 0
