"""Drafts of several tokens, judged in one call of the trunk: trees of tokens, and a row that feeds and keeps them.

A drafted token stands where it is the token that the sampler would choose at its place from the trunk's own scores. So
what is written is what one token at a time would have written, greedy or sampled, whoever drafts.

Letters: T tokens of a tree, V vocabulary, D trunk width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import DynamicCache

from modeling_pdt.trunk_split import layer_types

from .answer import Answer
from .plain import until_end
from .sampler import Sampler


@dataclass
class DraftTree:
    """
    Tokens that may follow the one in node 0, each after its parent.

    Args:
        token (`int`): The last token that stands; the trunk has not read it yet.
    """

    token: int
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False)
    depths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens, self.parents, self.depths = [self.token], [-1], [0]
        self._children: dict[tuple[int, int], int] = {}

    def add(self, parent: int, token: int) -> int:
        """The node of `token` after node `parent`; made once."""
        node = self._children.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
        return node

    def add_path(self, tokens: Sequence[int]) -> list[int]:
        """The nodes of tokens that follow node 0 one after another."""
        nodes = [0]
        for token in tokens:
            nodes.append(self.add(nodes[-1], token))
        return nodes[1:]

    def sees(self) -> torch.Tensor:
        """Which nodes each node attends to `[T, T]`: itself and those before it on its path."""
        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            sees[node] |= sees[parent]
        return sees

    def standing(self, chosen: Sequence[int]) -> list[int]:
        """The nodes that stand, in order, given the token that is chosen after every node."""
        path, node = [], 0
        while (node := self._children.get((node, chosen[node]), -1)) > 0:
            path.append(node)
        return path


class DraftRow:
    """
    One row of the trunk and its cache, with every layer's keys kept: windows are a matter of the mask.

    Args:
        answer (`Answer`): Whose trunk reads.
    """

    def __init__(self, answer: Answer) -> None:
        self.trunk, self.device = answer.trunk, answer.device
        self.cache, self.length = DynamicCache(), 0
        self.window = getattr(self.trunk.config, "sliding_window", None)
        self.types = set(layer_types(self.trunk.config))

    def feed(self, tokens: Sequence[int], depths: Sequence[int], sees_TT: torch.Tensor) -> torch.Tensor:
        """
        Final states `[T, D]` of tokens at the end of the row.

        Args:
            tokens (`list[int]`), depths (`list[int]`): Tokens and how far each stands behind the first of them.
            sees_TT (`torch.BoolTensor` of shape `[T, T]`): Which of them each attends to, besides the whole row.
        """
        position_T = self.length + torch.tensor(depths, device=self.device)
        key_L = torch.cat([torch.arange(self.length, device=self.device), position_T])
        sees_TL = torch.nn.functional.pad(sees_TT.to(self.device), (self.length, 0), value=True)
        masks = {"full_attention": sees_TL}
        if "sliding_attention" in self.types:
            masks["sliding_attention"] = sees_TL & (key_L > position_T[:, None] - self.window)
        masks = {kind: self._additive(masks[kind]) for kind in self.types}
        output = self.trunk.base_model(
            input_ids=torch.tensor([list(tokens)], device=self.device),
            attention_mask=masks if len(masks) > 1 else masks.popitem()[1],
            position_ids=position_T[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[0]

    def _additive(self, sees_TL: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(1, 1, *sees_TL.shape, dtype=self.trunk.dtype, device=self.device)
        return mask.masked_fill(~sees_TL, torch.finfo(mask.dtype).min)

    def keep(self, nodes: Sequence[int]) -> None:
        """Keeps these of the tokens fed last, in order, as the end of the row."""
        kept = torch.tensor(nodes, dtype=torch.long, device=self.device) + self.length
        places = torch.cat([torch.arange(self.length, device=self.device), kept])
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, places], layer.values[:, :, places]
        self.length += len(nodes)


class Drafter(Protocol):
    """What proposes tokens."""

    def start(self, stream: int, given: Sequence[int], state_TD: torch.Tensor) -> None:
        """
        A section begins after the tokens `given`, which follow what stood before; `state_TD` are the trunk's final
        states of all of them but the last.
        """

    def draft(self, token: int, place: int) -> DraftTree:
        """A tree after `token`, whose next token stands at `place` of the section."""

    def learn(self, tree: DraftTree, chosen: Sequence[int], path: Sequence[int], state_TD: torch.Tensor) -> None:
        """The trunk's choice after every node of the tree, the nodes that stand, and all states."""


def candidates(sampler: Sampler, logits_TV: torch.Tensor, stream: int, place_T: torch.Tensor) -> list[list[int]]:
    """
    Two tokens for every place: the one that the sampler would draw from these scores, and the likeliest other.

    Args:
        sampler (`Sampler`): Draws with the numbers that it will draw from the trunk's scores with.
        logits_TV (`torch.Tensor` of shape `[T, V]`): Scores of a drafter.
        stream (`int`), place_T (`torch.LongTensor` of shape `[T]`): Section, and places in it.
    """
    drawn_T = sampler.choose(logits_TV, torch.full_like(place_T, stream), place_T)
    other_T = logits_TV.scatter(1, drawn_T[:, None], -torch.inf).argmax(dim=1)
    return torch.stack([drawn_T, other_T], dim=1).tolist()


def write_drafted(answer: Answer, drafter: Drafter) -> None:
    """
    Writes section after section as [`write_sequential`] does, several tokens a call where drafts stand.

    Args:
        answer (`Answer`): What is written.
        drafter (`Drafter`): Proposes; it can change the number of calls, never a token.
    """
    row, unread = DraftRow(answer), list(answer.prompt)
    for stream in answer.streams:
        given = unread + answer.headers[stream]
        state_TD = torch.empty(0)
        if len(given) > 1:
            answer.meter.reading()
            ahead = range(len(given) - 1)
            state_TD = row.feed(given[:-1], ahead, torch.ones(len(ahead), len(ahead), dtype=torch.bool).tril())
            row.keep(ahead)
        drafter.start(stream, given, state_TD)
        tokens = _write_section(answer, drafter, row, stream, given[-1])
        answer.commit(stream, tokens)
        unread = tokens[-1:] + ([] if answer.sections[stream].finished else list(answer.settings.eos_ids[:1]))


def _write_section(answer: Answer, drafter: Drafter, row: DraftRow, stream: int, last: int) -> list[int]:
    """The section's tokens; all but the last of them are in the row at the end."""
    tokens: list[int] = []
    limit, eos_ids, head = (
        answer.settings.max_new_tokens,
        answer.settings.eos_ids,
        answer.trunk.get_output_embeddings(),
    )
    while len(tokens) < limit and not (tokens and last in eos_ids):
        tree = drafter.draft(last, len(tokens))
        state_TD = row.feed(tree.tokens, tree.depths, tree.sees())
        place_T = len(tokens) + torch.tensor(tree.depths, device=row.device)
        chosen = answer.sampler.choose(head(state_TD), torch.full_like(place_T, stream), place_T).tolist()
        path = tree.standing(chosen)
        new = [tree.tokens[node] for node in path] + [chosen[path[-1] if path else 0]]
        new = until_end(new[: limit - len(tokens)], eos_ids)
        path = path[: len(new) - 1]
        row.keep([0, *path])
        drafter.learn(tree, chosen, path, state_TD)
        tokens += new
        last = tokens[-1]
    return tokens
