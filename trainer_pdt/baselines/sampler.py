"""One sampler for every way of decoding: the token at a place is a function of the scores and of what is written.

Parallel decoding draws with uniform numbers keyed by seed, prompt, stream and place in the section. The same numbers
here make the baselines comparable token by token, and verification exact at any temperature: a drafted token stands
where it is the token that would be drawn.

Letters: R rows, V vocabulary.
"""

import torch
from transformers import LogitsProcessor

from modeling_pdt.generation_inputs import Inputs
from modeling_pdt.generation_settings import Settings
from modeling_pdt.sampling import choose_tokens, fold_keys, history_free, keyed_uniform, process_logits, prompt_keys

# By how much the token drawn leads the others: enough for a softmax of one, finite for criteria that take one.
LEAD = 1e4


class Sampler:
    """
    Chooses tokens for the rows of one request as [`ParallelDecoder`] does on first writing.

    Args:
        inputs (`Inputs`): With one prompt.
        settings (`Settings`): Seed, streams, sampling.
        device (`torch.device`): Of the scores.

    Raises:
        ValueError: For options whose processors look at what was written before.
    """

    def __init__(self, inputs: Inputs, settings: Settings, device: torch.device) -> None:
        if not history_free(inputs.processors):
            names = sorted({type(processor).__name__ for row in inputs.processors for processor in row})
            raise ValueError(
                f"logits processors {names}, allowed for baselines: those that look at the scores only, as those of "
                "temperature, top_k, top_p and min_p do."
            )
        self.processors, self.do_sample = inputs.processors[:1], settings.do_sample
        streams = torch.arange(settings.num_streams, device=device)
        prompt_key = torch.tensor(prompt_keys(inputs.prompts), device=device).expand_as(streams)
        self.key_S = fold_keys(torch.full_like(streams, settings.seed), prompt_key, streams)

    def choose(self, scores_RV: torch.Tensor, stream_R: torch.Tensor, place_R: torch.Tensor) -> torch.Tensor:
        """
        Tokens `[R]`.

        Args:
            scores_RV (`torch.Tensor` of shape `[R, V]`): Logits.
            stream_R (`torch.LongTensor` of shape `[R]`): Stream of each row.
            place_R (`torch.LongTensor` of shape `[R]`): Place in the section of the token to be chosen, from 0.
        """
        scores_RV = process_logits(scores_RV, self.processors * len(scores_RV), [])
        uniform_R = None
        if self.do_sample:
            uniform_R = keyed_uniform(place_R, torch.zeros_like(place_R), state=self.key_S[stream_R])
        return choose_tokens(scores_RV, self.do_sample, uniform_R)


class SamplerProcessor(LogitsProcessor):
    """
    The sampler inside greedy `generate` of transformers: in each row the token that is drawn gets the highest score.

    No token is forbidden, since prompt lookup drops drafts of forbidden tokens before the trunk has judged them.

    Args:
        sampler (`Sampler`): Chooses.
        streams (`list[int]`): Stream of each row.
        start (`int`): Column at which the rows' sections start.
    """

    def __init__(self, sampler: Sampler, streams: list[int], start: int) -> None:
        self.sampler, self.start = sampler, start
        self.stream_R = torch.tensor(streams, device=sampler.key_S.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `[R, V]` whose largest entry is the token drawn."""
        place_R = torch.full_like(self.stream_R, input_ids.shape[1] - self.start)
        chosen_R = self.sampler.choose(scores, self.stream_R, place_R)
        return scores.scatter(1, chosen_R[:, None], scores.amax(dim=1, keepdim=True) + LEAD)
