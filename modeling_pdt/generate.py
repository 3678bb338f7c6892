"""`generate`: the arguments of a parallel decoding call."""

from typing import Any

import torch

from .callbacks import ParallelDecodingCallback
from .generation_inputs import merge_generation_config, prepare_inputs
from .generation_pdt import ParallelDecoder
from .outputs import Merge, ParallelGenerateOutput


def parallel_generate(
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    tokenizer: Any = None,
    plan_texts: list | None = None,
    plan_contract: dict | list[dict] | None = None,
    stream_prefixes: list | None = None,
    seed_texts: list | None = None,
    seed_notes: torch.Tensor | None = None,
    streamer: Any = None,
    generation_config: Any = None,
    logits_processor: list | None = None,
    stopping_criteria: list | None = None,
    interventions: list | None = None,
    callbacks: list[ParallelDecodingCallback] | None = None,
    merge: Merge | None = None,
    seed: int = 0,
    return_dict_in_generate: bool | None = None,
    **kwargs: Any,
) -> ParallelGenerateOutput | torch.Tensor:
    """
    Writes `num_streams` sections of every prompt's answer at the same time.

    Args:
        model (`PDTForParallelDecoding`): Trunk and adapters.
        input_ids, attention_mask (`torch.LongTensor` of shape `[B, T]`): Rendered prompts, padded on any side.
        tokenizer (*optional*): Required when an argument below is text.
        plan_texts (`list`, *optional*): Plan items `{"text": ..., "stream": ...}`, for all prompts or per prompt.
        plan_contract (`dict` or one per prompt, *optional*): Plan items and titles as the dataset holds them, see
            [`read_contract`]; in place of `plan_texts`. `stream_prefixes` win over its titles.
        stream_prefixes (`list[str]`, *optional*): Headers, `[stream]` or `[prompt][stream]`.
        seed_texts (`list[str]`, *optional*): Notes at the start, as text, `[stream]` or `[prompt][stream]`.
        seed_notes (`torch.Tensor` of shape `[places, N]` or `[B, places, N]`, *optional*): The same as vectors.
        streamer (`ParallelStreamer` or `BaseStreamer`, *optional*): Called at commit only.
        generation_config (*optional*): Merged over the model's; keyword arguments override both.
        logits_processor, stopping_criteria (`list`, *optional*): Called with each row's own history; a criterion that
            fires ends the row after the token just chosen.
        interventions (`list[Intervention]`, *optional*): Controlled changes to what the streams read.
        callbacks (`list[ParallelDecodingCallback]`, *optional*): Told of every event as it happens.
        merge (`Callable`, *optional*): `merge(parts, results)` gives the tokens of a prompt's merged answer, from the
            tokens of each stream's header and section in plan order, without EOS, and from their [`StreamResult`]s.
        seed (`int`, *optional*, defaults to 0): Sampling is a function of it and of what is written.
        return_dict_in_generate (`bool`, *optional*): Return the full output in place of `sequences`.
        kwargs: Fields of [`PDTGenerationConfig`]; `max_new_tokens` counts section tokens per stream.

    Raises:
        ValueError: For an impossible argument, naming it and the allowed range.
    """
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in model.stack.modules()):
        raise ValueError("activation checkpointing drops the cache in training mode: call model.eval() to generate.")
    dtype = model.stack.heads.note_norm.weight.dtype
    if dtype != torch.float32:
        raise ValueError(
            f"adapters must be float32, got {dtype}: load the model anew, dtype of from_pretrained is the trunk's."
        )
    if merge is not None and not callable(merge):
        raise ValueError(f"merge must be a function of parts and results, got {merge!r}.")
    config = merge_generation_config(model, generation_config, kwargs)
    inputs, settings = prepare_inputs(
        model,
        config,
        input_ids,
        attention_mask,
        tokenizer,
        plan_texts,
        stream_prefixes,
        seed_texts,
        seed_notes,
        logits_processor,
        stopping_criteria,
        interventions,
        seed,
        plan_contract,
    )
    inputs.merge = merge
    output = ParallelDecoder(model, inputs, settings, streamer, callbacks).run()
    wants_dict = config.return_dict_in_generate if return_dict_in_generate is None else return_dict_in_generate
    return output if wants_dict else output.sequences
