"""The trunk in two exact halves: `run_lower` up to a layer, `run_upper` from there to the final norm.

Letters: R rows, T tokens, D trunk width.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from .prefix import PrefixCache, repeat_rows

STACK_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
MASK_MAKERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


@dataclass(frozen=True)
class TapState:
    """
    The trunk between its halves: the states at the tap and what the upper layers need besides.

    Args:
        hidden (`torch.Tensor` of shape `[R, T, D]`): Input of the first upper layer.
        position_ids (`torch.LongTensor` of shape `[R, T]`): Positions of the tokens.
        position_embeddings (`tuple[torch.Tensor]`): Rotary embeddings of these positions.
        masks (`dict[str, torch.Tensor | None]`): Attention mask by layer type.
        cache (`Cache`, *optional*): Cache whose lower layers have been updated.
        split (`int`): Index of the first upper layer.
        layer_kwargs (`dict`): Further keyword arguments for every decoder layer.
        prefix ([`Prefix`], *optional*): What further passes over the same rows need not compute.
    """

    hidden: torch.Tensor
    position_ids: torch.Tensor
    position_embeddings: Any
    masks: dict[str, torch.Tensor | None]
    cache: Cache | None
    split: int
    layer_kwargs: dict[str, Any]
    prefix: "Prefix | None" = None

    def detach(self) -> "TapState":
        """The same state outside any graph."""
        prefix = None if self.prefix is None else replace(self.prefix, rest=self.prefix.rest.detach())
        return replace(self, hidden=self.hidden.detach(), prefix=prefix)


@dataclass(frozen=True)
class Prefix:
    """
    The first columns of rows after the bare trunk's upper half: nothing conditions them, so they are the same in every
    pass.

    Args:
        output (`torch.Tensor` of shape `[R, P, D]`): What the language-model head reads there; without gradient.
        rest (`TapState`): The tap of the other columns, whose upper layers read the keys and values of these.
    """

    output: torch.Tensor
    rest: TapState


@cache
def knows_windows(family: type) -> bool:
    """Whether configurations of this class have a sliding window; a file may hold one that its attention ignores."""
    return "sliding_window" in inspect.signature(family).parameters


def layer_types(config: Any) -> list[str]:
    """Attention type of every decoder layer."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = knows_windows(type(config)) and config.sliding_window
        types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return list(types)


def check_trunk(trunk: nn.Module) -> str:
    """
    The attribute name of the trunk's stack of decoder layers, if this trunk can be split.

    Raises:
        ValueError: Naming what the trunk lacks.
    """
    if hasattr(trunk, "_orig_mod"):
        kind = type(trunk._orig_mod).__name__
        raise ValueError(f"{type(trunk).__name__} cannot be wrapped: give the {kind} that torch.compile was given.")
    name = getattr(trunk, "base_model_prefix", "") or "model"
    stack = getattr(trunk, name, None)
    stack = getattr(stack, "base_layer", stack)
    missing = [part for part in STACK_PARTS if not hasattr(stack, part)]
    if stack is None or missing:
        raise ValueError(
            f"{type(trunk).__name__} cannot be wrapped: its '{name}' must be a stack of decoder layers with "
            f"{list(STACK_PARTS)}; missing: {missing or [name]}."
        )
    if trunk.get_output_embeddings() is None:
        raise ValueError(f"{type(trunk).__name__} cannot be wrapped: it has no language-model head.")
    config = trunk.config.get_text_config(decoder=True)
    unknown = sorted(set(layer_types(config)) - set(MASK_MAKERS))
    if unknown:
        raise ValueError(
            f"{type(trunk).__name__} cannot be wrapped: layer types {unknown} are not of {sorted(MASK_MAKERS)}."
        )
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ValueError(f"{type(trunk).__name__} cannot be wrapped: config.{field} changes the logits.")
    devices = set((getattr(trunk, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}
    if len(devices) > 1:
        raise ValueError(
            f"{type(trunk).__name__} cannot be wrapped: its device_map spreads it over {sorted(devices)}."
        )
    if "layer_type" in inspect.signature(stack.rotary_emb.forward).parameters:
        raise ValueError(f"{type(trunk).__name__} cannot be wrapped: its rotary embedding differs by layer type.")
    return name


def check_layer_parts(stack: nn.Module, layers: Iterable[int]) -> None:
    """
    Whether something can act inside these layers, between attention and MLP; see [`run_parts`].

    Args:
        stack (`nn.Module`): The trunk's decoder stack.
        layers (`Iterable[int]`): Indices of the layers.

    Raises:
        ValueError: Naming what a layer has in place of the usual parts.
    """
    for index in layers:
        layer = stack.layers[index]
        parts = [name for name, _ in layer.named_children()]
        scales = [name for name, value in vars(layer).items() if isinstance(value, float) and value != 1.0]
        if set(parts) != set(LAYER_PARTS) or scales or not isinstance(layer, GradientCheckpointingLayer):
            raise ValueError(
                f"snc_placement='after_attention' needs layers that are a transformers GradientCheckpointingLayer of "
                f"{list(LAYER_PARTS)} with unscaled residuals; layer {index} is a {type(layer).__name__} of {parts}"
                f"{f' with factors {scales}' if scales else ''}. Use snc_placement='between'."
            )


def attention_part(layer: nn.Module, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """First half of a decoder layer: `hidden` `[R, T, D]` with what attention adds."""
    return hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)[0]


def mlp_part(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Second half of a decoder layer; a mixture of experts also returns its router's scores."""
    update = layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden + (update[0] if isinstance(update, tuple) else update)


def run_parts(
    layer: nn.Module, hidden: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor], **arguments: Any
) -> torch.Tensor:
    """
    A decoder layer with `act` on its residual stream between attention and MLP.

    Under gradient checkpointing each half is recomputed by itself from the states it was given. `act` runs outside
    both, so that what it reads need not pass through a recomputed region.
    """
    if not (layer.gradient_checkpointing and layer.training):
        return mlp_part(layer, act(attention_part(layer, hidden, **arguments)))
    if not layer._can_checkpoint_with_cache:
        # A recomputed attention would append to the cache a second time; the trunk's own layers drop it likewise.
        arguments.update(past_key_values=None, use_cache=False)
    checkpoint = layer._gradient_checkpointing_func
    return checkpoint(partial(mlp_part, layer), act(checkpoint(partial(attention_part, layer, **arguments), hidden)))


@contextmanager
def replaced(module: nn.Module, **values: Any) -> Iterator[None]:
    """
    Attributes of `module` have these values inside: a `forward` runs within the module's own hooks, as units of FSDP
    need it.
    """
    own = {name: vars(module)[name] for name in values if name in vars(module)}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(module, name)
        for name, value in own.items():
            setattr(module, name, value)


def needs_its_call(layer: nn.Module) -> bool:
    """Whether more happens in a layer's call than in its class's `forward`, by hooks or because it is trained."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return bool(layer.training or hooks or "forward" in vars(layer))


def run_layer(
    stack: nn.Module,
    index: int,
    kind: str,
    hidden: torch.Tensor,
    state: TapState,
    act: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Decoder layer `index`, of attention type `kind`, of the trunk on `hidden` `[R, T, D]`, with `act` between its
    attention and its MLP.
    """
    layer, reads = stack.layers[index], isinstance(state.cache, PrefixCache)
    arguments = {
        "attention_mask": state.masks[kind],
        "position_embeddings": state.position_embeddings,
        "position_ids": state.position_ids,
        "past_key_values": state.cache,
        "use_cache": state.cache is not None and not reads,
        **state.layer_kwargs,
    }
    if act is None and not reads:
        return layer(hidden, **arguments)
    if act is not None and not reads and not needs_its_call(layer):
        return run_parts(layer, hidden, act, **arguments)
    changes: dict[str, Any] = {} if act is None else {"forward": partial(run_parts, layer, act=act)}
    with replaced(layer, **changes, **({"_can_checkpoint_with_cache": True} if reads else {})):
        return layer(hidden, **arguments)


def make_masks(
    stack: nn.Module,
    kinds: Iterable[str],
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Cache | None,
) -> dict[str, torch.Tensor | None]:
    """The trunk's own attention masks by layer type, for tokens that the cache does not hold yet."""
    return {
        kind: MASK_MAKERS[kind](
            config=stack.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        for kind in sorted(set(kinds))
    }


def run_lower(
    stack: nn.Module,
    split: int,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | dict | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    layer_kwargs: dict[str, Any] | None = None,
) -> TapState:
    """
    Embedding and layers below `split`.

    Args:
        stack (`nn.Module`): The trunk's decoder stack (not the causal LM).
        split (`int`): Index of the first upper layer, 0 to the number of layers.
        input_ids (`torch.LongTensor` of shape `[R, T]`, *optional*), inputs_embeds (*optional*): Exactly one of them.
        attention_mask (`torch.Tensor` of shape `[R, past + T]`, *optional*): 1 for real tokens; or a mapping of
            ready masks by layer type.
        position_ids (`torch.LongTensor` of shape `[R, T]`, *optional*): Default: counted from the cache's length.
        past_key_values (`Cache`, *optional*): Updated in place.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    hidden = stack.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if position_ids is None:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device).unsqueeze(0)
    if isinstance(attention_mask, dict):
        masks = attention_mask
    else:
        masks = make_masks(stack, layer_types(stack.config), hidden, attention_mask, position_ids, past_key_values)
    embeddings = stack.rotary_emb(hidden, position_ids)
    start = TapState(hidden, position_ids, embeddings, masks, past_key_values, 0, layer_kwargs or {})
    return run_on(stack, start, split)


def run_on(stack: nn.Module, tap: TapState, split: int) -> TapState:
    """The trunk at `split`, from an earlier place between its layers."""
    hidden, kinds = tap.hidden, layer_types(stack.config)
    for index in range(tap.split, split):
        hidden = run_layer(stack, index, kinds[index], hidden, tap)
    return replace(tap, hidden=hidden, split=split)


def rewind_tap(
    stack: nn.Module, tap: TapState, hidden: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
) -> TapState:
    """
    The tap of rows that went back after their lower half ran: for their upper half, whose layers hold no token of this
    call yet.

    Args:
        stack (`nn.Module`): The trunk's decoder stack.
        tap (`TapState`): From [`run_lower`], with a cache.
        hidden (`torch.Tensor` of shape `[R, T, D]`): Tap states of the tokens where the rows stand now.
        attention_mask (`torch.Tensor` of shape `[R, past + T]`): 1 for real tokens.
        position_ids (`torch.LongTensor` of shape `[R, T]`): Positions of these tokens.
    """
    kinds, upper = layer_types(stack.config)[tap.split :], Cache(layers=tap.cache.layers[tap.split :])
    masks = make_masks(stack, kinds, hidden, attention_mask, position_ids, upper)
    embeddings = stack.rotary_emb(hidden, position_ids)
    return replace(tap, hidden=hidden, position_ids=position_ids, position_embeddings=embeddings, masks=masks)


@torch.no_grad()
def share_prefix(
    stack: nn.Module,
    tap: TapState,
    split: int,
    columns: int,
    siblings: int,
    attention_mask: torch.Tensor,
    upper: bool = True,
) -> TapState:
    """
    Runs the bare trunk over the first columns, once for all passes over these rows and for siblings that begin alike;
    then the lower half over the other columns.

    Every layer is called equally often, whatever the rows: processes that share layers stay in step.

    Args:
        stack (`nn.Module`): The trunk's decoder stack.
        tap (`TapState`): The rows at `split` or before any layer, without a cache, of at least two columns.
        split (`int`): Index of the first upper layer.
        columns (`int`): Columns that nothing conditions, 1 to T - 1.
        siblings (`int`): Number of adjacent rows that are equal in these columns.
        attention_mask (`torch.Tensor` of shape `[R, T]`): 1 for real tokens.
        upper (`bool`, *optional*, defaults to `True`): Run the upper half over the first columns too. Without it,
            the tap has no `prefix`.
    """
    if tap.split == split and not upper:
        return tap
    empty = replace(tap, cache=PrefixCache(len(stack.layers)))
    first = [values[::siblings, :columns] for values in (tap.hidden, attention_mask, tap.position_ids)]
    first = run_on(stack, rewind_tap(stack, empty, *first), split)
    output = run_upper(stack, first) if upper else None
    rest = rewind_tap(stack, empty, tap.hidden[:, columns:], attention_mask, tap.position_ids[:, columns:])
    rest = run_on(stack, rest, split)
    rows = len(tap.hidden)
    whole = replace(tap, hidden=torch.cat([repeat_rows(first.hidden, rows), rest.hidden], dim=1), split=split)
    return replace(whole, prefix=Prefix(repeat_rows(output, rows), rest)) if upper else whole


def run_upper(
    stack: nn.Module,
    tap: TapState,
    between: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    collect: list[torch.Tensor] | None = None,
    after_attention: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> torch.Tensor:
    """
    Layers from the split on, and the final norm.

    Args:
        stack (`nn.Module`): The trunk's decoder stack.
        tap (`TapState`): From [`run_lower`]; its cache's upper layers are updated in place.
        between (`Callable`, *optional*): `between(i, hidden)` is applied to the input of layer i, and with i = the
            number of layers to the output of the last one. It runs outside the layers, so a layer recomputed for
            gradient checkpointing receives its result as an ordinary input.
        collect (`list`, *optional*): Receives the input of every upper layer.
        after_attention (`Mapping`, *optional*): By layer index, a function of the layer's residual stream after
            attention. Gradient checkpointing recomputes what is before and after it, not the function itself.

    Returns:
        `torch.Tensor` of shape `[R, T, D]`: what the language-model head reads.
    """
    hidden, kinds = tap.hidden, layer_types(stack.config)
    last = len(stack.layers)
    after_attention = after_attention or {}
    for index in range(tap.split, last):
        hidden = between(index, hidden) if between is not None else hidden
        if collect is not None:
            collect.append(hidden)
        hidden = run_layer(stack, index, kinds[index], hidden, tap, after_attention.get(index))
    hidden = between(last, hidden) if between is not None else hidden
    return stack.norm(hidden)
