"""EAGLE (Li et al. 2024, arXiv 2401.15077), ours: one decoder layer continues the trunk's final states.

It reads a token's embedding beside the state before it and predicts the token's own state, from which the trunk's
output embedding guesses the next token. Drafts are a chain with one alternative at every place.

Letters: R rows, T tokens, D trunk width.
"""

from collections.abc import Sequence

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel

from .answer import Answer
from .drafts import DraftTree, candidates

# Weight of the cross-entropy beside the distance of the states, as in the paper.
TOKEN_WEIGHT = 0.1


class EagleHead(nn.Module, PyTorchModelHubMixin):
    """
    The layer that continues states.

    Args:
        width (`int`): D.
        num_heads (`int`), intermediate_size (`int`): Of the decoder layer.
    """

    def __init__(self, width: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.join = nn.Linear(2 * width, width)
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=num_heads,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.body = LlamaModel(config)
        # States come from behind the trunk's last norm and go to its output embedding as they are.
        self.body.embed_tokens, self.body.norm = None, nn.Identity()

    @classmethod
    def for_trunk(cls, trunk: PreTrainedModel) -> "EagleHead":
        """A new layer of the trunk's width."""
        width = trunk.config.hidden_size
        return cls(width, trunk.config.num_attention_heads, 4 * width)

    def forward(self, embedding: torch.Tensor, state: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """
        Predicted states `[R, T, D]` of tokens.

        Args:
            embedding (`torch.Tensor` of shape `[R, T, D]`): The trunk's embeddings of the tokens.
            state (`torch.Tensor` of shape `[R, T, D]`): Final states of the tokens before them.
            cache (`Cache`, *optional*): Of this layer.
        """
        joined = self.join(torch.cat([embedding, state], dim=-1))
        return self.body(inputs_embeds=joined, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def loss(
        self, trunk: PreTrainedModel, state_RTD: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """
        Distance of predicted and true states, and cross-entropy of the distributions that they give.

        Args:
            trunk (`PreTrainedModel`): Gives embeddings, and reads the states.
            state_RTD (`torch.Tensor` of shape `[R, T, D]`): The trunk's final states.
            input_ids, labels (`torch.LongTensor` of shape `[R, T]`): Rows; states of tokens with a label count.
        """
        predicted = self(trunk.get_input_embeddings()(input_ids[:, 1:]), state_RTD[:, :-1])
        counts, head = labels[:, 1:] != -100, trunk.get_output_embeddings()
        predicted, true = predicted[counts], state_RTD[:, 1:][counts]
        tokens = nn.functional.cross_entropy(head(predicted), head(true).softmax(-1))
        return nn.functional.smooth_l1_loss(predicted, true) + TOKEN_WEIGHT * tokens


class Eagle:
    """
    Proposes a chain of tokens, each drawn from the state that the layer predicts for the one before.

    Args:
        answer (`Answer`): Its sampler draws from the predictions too, with the numbers of the trunk's draws.
        head (`EagleHead`): Trained on this trunk.
        length (`int`): Tokens of the chain.
    """

    def __init__(self, answer: Answer, head: EagleHead, length: int) -> None:
        self.sampler, self.length, self.cache = answer.sampler, length, DynamicCache()
        self.head = head.to(answer.device, answer.trunk.dtype)
        # Past the hooks of the module: a look-up for a draft is no call of the trunk.
        self.embed, self.read = answer.trunk.get_input_embeddings().forward, answer.trunk.get_output_embeddings()
        self.state: torch.Tensor | None = None

    def start(self, stream: int, given: Sequence[int], state_TD: torch.Tensor) -> None:
        """Reads the tokens before the section."""
        self.stream = stream
        if len(given) > 1:
            self._read(given[1:], state_TD)

    def _read(self, tokens: Sequence[int], state_TD: torch.Tensor) -> None:
        """Tokens that stand, with the states before them; predicts the state of the last."""
        self.state = self._predict(tokens, state_TD[None])

    def _predict(self, tokens: Sequence[int], state_1TD: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([list(tokens)], device=state_1TD.device)
        return self.head(self.embed(ids), state_1TD, self.cache)[:, -1:]

    def draft(self, token: int, place: int) -> DraftTree:
        """A chain after `token`, with the likeliest other token beside each of its own."""
        tree, node, state = DraftTree(token), 0, self.state
        standing = [(layer.keys, layer.values) for layer in self.cache.layers]
        for offset in range(self.length if state is not None else 0):
            if offset:
                state = self._predict(tree.tokens[node : node + 1], state)
            place_1 = torch.tensor([place + offset], device=state.device)
            guesses = candidates(self.sampler, self.read(state[0]), self.stream, place_1)[0]
            node, _ = [tree.add(node, guess) for guess in guesses]
        for layer, (keys, values) in zip(self.cache.layers, standing, strict=True):
            layer.keys, layer.values = keys, values
        return tree

    def learn(self, tree: DraftTree, chosen: Sequence[int], path: Sequence[int], state_TD: torch.Tensor) -> None:
        """Reads what stands now, with the trunk's own states."""
        nodes = [0, *path]
        self._read([chosen[node] for node in nodes], state_TD[nodes])
