"""Medusa (Cai et al. 2024, arXiv 2401.10774), ours: heads on the trunk's final state guess the tokens after the next.

Unlike the paper's, the heads share the trunk's output embedding, and a guess stands only where it is the token that
would have been chosen: there is no typical acceptance, and nothing is lost.

Letters: H heads, R rows, T tokens, D trunk width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from transformers import PreTrainedModel

from .answer import Answer
from .drafts import DraftTree, candidates

# Weight of each head's loss over that of the head before it, as in the paper.
HEAD_DECAY = 0.8


class MedusaHeads(nn.Module, PyTorchModelHubMixin):
    """
    Residual heads; untrained, each guesses what the trunk's own head guesses.

    Args:
        width (`int`): D.
        num_heads (`int`, *optional*, defaults to 3): Head h, from 0, guesses the token h + 2 places after its state.
    """

    def __init__(self, width: int, num_heads: int = 3) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, width) for _ in range(num_heads))
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @classmethod
    def for_trunk(cls, trunk: PreTrainedModel) -> "MedusaHeads":
        """New heads of the trunk's width."""
        return cls(trunk.config.hidden_size)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """States `[H, ..., D]` for the output embedding, from final states `[..., D]`."""
        return torch.stack([state + nn.functional.silu(head(state)) for head in self.heads])

    def loss(
        self, trunk: PreTrainedModel, state_RTD: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """
        Weighted sum over heads of the cross-entropy of the tokens that they guess.

        Args:
            trunk (`PreTrainedModel`): Its output embedding reads the heads.
            state_RTD (`torch.Tensor` of shape `[R, T, D]`): The trunk's final states.
            input_ids, labels (`torch.LongTensor` of shape `[R, T]`): Labels are not shifted, -100 where none.
        """
        losses = []
        for number, guessed in enumerate(self(state_RTD)):
            logits = trunk.get_output_embeddings()(guessed[:, : -(number + 2)])
            wanted = labels[:, number + 2 :]
            losses.append(HEAD_DECAY**number * nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
        return torch.stack(losses).sum()


class Medusa:
    """
    Proposes the heads' likeliest tokens as a tree: two of the first head, each with two of the second, and so on.

    Args:
        answer (`Answer`): Its sampler draws from the heads too, with the numbers of its draws from the trunk.
        heads (`MedusaHeads`): Trained on this trunk.
    """

    def __init__(self, answer: Answer, heads: MedusaHeads) -> None:
        self.sampler, self.embedding = answer.sampler, answer.trunk.get_output_embeddings()
        self.heads = heads.to(answer.device, answer.trunk.dtype)

    def start(self, stream: int, given: Sequence[int], state_TD: torch.Tensor) -> None:
        """The last state before the section, from which its first token was expected."""
        self.stream, self.state = stream, state_TD[-1:]

    def draft(self, token: int, place: int) -> DraftTree:
        """A tree of the heads' guesses after `token`."""
        tree, nodes = DraftTree(token), [0]
        if not len(self.state):
            return tree
        logits_HV = self.embedding(self.heads(self.state[0]))
        place_H = place + torch.arange(len(logits_HV), device=logits_HV.device)
        for tokens in candidates(self.sampler, logits_HV, self.stream, place_H):
            nodes = [tree.add(node, guess) for node in nodes for guess in tokens]
        return tree

    def learn(self, tree: DraftTree, chosen: Sequence[int], path: Sequence[int], state_TD: torch.Tensor) -> None:
        """The state that the newest token was chosen from."""
        self.state = state_TD[path[-1] if path else 0][None]
