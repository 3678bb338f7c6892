"""Lookahead decoding (Fu et al. 2024, arXiv 2402.02057), ours: drafts from the trunk's own Jacobi iterations.

A window of W columns holds guesses for the places ahead; every call of the trunk moves each column one place on. What
a column went through is an n-gram, kept under its first token, and is drafted when that token is the last that stands.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..arguments import check_whole
from .drafts import DraftTree


@dataclass(frozen=True)
class LookaheadOptions:
    """
    Sizes of lookahead decoding; a call computes up to `1 + (ngram - 1) * (window + guesses)` tokens.

    Args:
        window (`int`, *optional*, defaults to 5): W, columns.
        ngram (`int`, *optional*, defaults to 4): Tokens of an n-gram, at least 2; the window has one row less.
        guesses (`int`, *optional*, defaults to 5): N-grams kept and drafted per first token, the newest ones.
    """

    window: int = 5
    ngram: int = 4
    guesses: int = 5

    def __post_init__(self) -> None:
        check_whole("window", self.window, 1)
        check_whole("ngram", self.ngram, 2)
        check_whole("guesses", self.guesses, 1)


class Lookahead:
    """
    Proposes n-grams from a pool that it fills on the way.

    In the tree of a call the window's oldest row follows the last token, and each column of the later rows follows its
    own older tokens: the mask of the paper. Where a token of the window stands by itself, it is taken as well.

    Args:
        options (`LookaheadOptions`): Sizes.
    """

    def __init__(self, options: LookaheadOptions) -> None:
        self.window, self.rows, self.guesses = options.window, options.ngram - 1, options.guesses
        self.pool: dict[int, dict[tuple[int, ...], None]] = {}
        self.random = random.Random(0)

    def start(self, stream: int, given: Sequence[int], state_TD: torch.Tensor) -> None:
        """A new window of tokens that were given; n-grams of earlier sections stay."""
        self.given = list(given)
        self.levels = [self.random.choices(self.given, k=self.window) for _ in range(self.rows)]

    def draft(self, token: int, place: int) -> DraftTree:
        """The window and the n-grams that start with `token`."""
        tree = DraftTree(token)
        self.newest = tree.add_path(self.levels[0])
        for level in self.levels[1:]:
            self.newest = [tree.add(node, guess) for node, guess in zip(self.newest, level, strict=True)]
        for guess in self.pool.get(token, ()):
            tree.add_path(guess)
        return tree

    def learn(self, tree: DraftTree, chosen: Sequence[int], path: Sequence[int], state_TD: torch.Tensor) -> None:
        """The columns' n-grams go to the pool; the window moves on by the tokens that stand."""
        new = [chosen[node] for node in self.newest]
        for first, *rest in zip(*self.levels, new, strict=True):
            kept = self.pool.setdefault(first, {})
            kept.pop(tuple(rest), None)
            kept[tuple(rest)] = None
            if len(kept) > self.guesses:
                del kept[next(iter(kept))]
        levels = [level[len(path) :] for level in (*self.levels[1:], new)]
        self.levels = [level + self.random.choices(self.given, k=self.window - len(level)) for level in levels]
