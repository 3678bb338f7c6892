"""A self check of a built model: the adapter is where its configuration says, and conditioning reaches the logits.

Letters: S streams, T tokens, K notes, N note width.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8
# Rounding that repeated forwards of one trunk may differ by, in units of the largest logit's precision.
ROUNDING = 8


@dataclass(frozen=True)
class ConditioningCheck:
    """
    What [`check_conditioning`] measured: the largest change of a logit against the bare trunk, on random tokens.

    Args:
        snc_placement (`str`), layers (`list[int]`): Where the trunk is conditioned.
        silent_change (`float`): By notes that nobody may see; 0 but for kernels that round differently every time.
        notes_change (`float`): By random notes that every token sees.
        streams_change (`float`): By the stream adapters.
        untrained (`list[str]`): Of `"snc"` and `"stream_adapters"`, what was never trained.
    """

    snc_placement: str
    layers: list[int]
    silent_change: float
    notes_change: float
    streams_change: float
    untrained: list[str]


def check_installation(model: Any) -> None:
    """
    Checks by identity that the trunk runs the adapter that the configuration describes.

    Raises:
        RuntimeError: Naming what is elsewhere, missing or switched off.
    """
    stack = model.stack
    if not hasattr(stack, "pdt_configs"):
        raise RuntimeError(f"the trunk's stack is a bare {type(stack).__name__}: its PDT layer was taken off.")
    config = stack.pdt_configs[stack.active]
    if model.peft.peft_config[stack.active] is not config or model.config._adapter_config is not config:
        raise RuntimeError(
            f"adapter {stack.active!r} is active, but the model's configuration describes another one: "
            "use model.config.attach_adapter(model.peft.active_peft_config)."
        )
    if stack.disable_adapters:
        raise RuntimeError(f"adapter {stack.active!r} is disabled: the model is its trunk.")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; each gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def recorded_calls(modules: list[nn.Module]) -> Iterator[set[int]]:
    """Indices of the modules that run inside the context."""
    called: set[int] = set()
    handles = [
        module.register_forward_hook(lambda *_, index=index: called.add(index)) for index, module in enumerate(modules)
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_changes(model: Any) -> tuple[dict[str, float], float]:
    """
    Largest change of a logit against the bare trunk, on the same random tokens in every stream.

    Returns:
        The change by what is conditioned on: `"silent"` (notes that nobody may see), `"snc"` (random notes that every
        token sees), `"stream_adapters"`; and how much of it may be rounding.

    Raises:
        RuntimeError: When a forward passes by an SNC site or a stream adapter.
    """
    stack, config = model.stack, model.config
    streams, device = config.num_streams, stack.snc[0].gate.logit.device
    random = torch.Generator("cpu").manual_seed(0)
    vocabulary = model.trunk.config.get_text_config(decoder=True).vocab_size
    ids_T = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=random, device="cpu")
    ids_ST = ids_T.to(device).repeat(streams, 1)
    shape = (streams, config.notes_per_block, config.notes_dim)
    notes_SKN = torch.randn(shape, generator=random, device="cpu").to(device)
    modules = [*stack.snc, *stack.pdt_stream_adapters[stack.active]]
    with evaluation_mode(model), recorded_calls(modules) as called:
        states = stack.base_layer(input_ids=ids_ST, use_cache=False).last_hidden_state
        trunk = model.get_output_embeddings()(states)

        def change(**conditioning: torch.Tensor) -> float:
            return float((model(ids_ST, **conditioning).logits - trunk).abs().max())

        changes = {
            "silent": change(notes=notes_SKN, notes_mask=torch.zeros(notes_SKN.shape[:2], device=device)),
            "snc": change(notes=notes_SKN),
            "stream_adapters": change(stream_ids=torch.arange(streams, device=device)),
        }
    missed = [type(module).__name__ for index, module in enumerate(modules) if index not in called]
    if missed:
        raise RuntimeError(f"the forward passes by {missed} on layers {config.instrumented_layers}.")
    return changes, ROUNDING * torch.finfo(trunk.dtype).eps * float(trunk.abs().max())


def check_conditioning(model: Any) -> ConditioningCheck:
    """
    Checks that a model's adapter is installed and that notes and streams reach the logits.

    Four forwards of a few tokens; parameters, modes and the global random state stay as they are.

    Args:
        model (`PDTForParallelDecoding`): The model, on its device.

    Returns:
        [`ConditioningCheck`]. What is untrained is also a warning, which says whether it changes anything yet.

    Raises:
        RuntimeError: When the adapter is not where its configuration says, when notes that nobody may see change the
            logits, or when a trained part changes none.
    """
    check_installation(model)
    layers, trained = list(model.config.instrumented_layers), model.config.trained_parts
    changes, rounding = measure_changes(model)
    silent = changes.pop("silent")
    if not silent <= rounding:
        raise RuntimeError(f"notes that nobody may see change the logits by {silent:.3g}, allowed: {rounding:.3g}.")
    for part, value in changes.items():
        if part in trained and not value > silent:
            raise RuntimeError(f"{part} is trained, but does not change the logits on layers {layers}.")
        if part not in trained:
            effect = (
                "changes the logits without having learnt to" if value > silent else "does not change the logits yet"
            )
            logger.warning("%s is untrained and %s.", part, effect)
    return ConditioningCheck(
        snc_placement=model.config.snc_placement,
        layers=layers,
        silent_change=silent,
        notes_change=changes["snc"],
        streams_change=changes["stream_adapters"],
        untrained=[part for part in changes if part not in trained],
    )
