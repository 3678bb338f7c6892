"""PDTForParallelDecoding: a frozen trunk, the PDT adapter on it, and parallel decoding.

Letters: R rows, T tokens, W notes of a window, N note width, M supervised positions.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.utils import resolve_revision

from .adapter_layer import PDTStack, expand_stream_ids, restrict_to_streams
from .adapter_model import check_bare, register_pdt
from .conditioning_check import ConditioningCheck, check_conditioning
from .configuration_adapter import PDTAdapterConfig
from .configuration_generation import PDTGenerationConfig
from .configuration_pdt import PDTConfig
from .generate import parallel_generate
from .hub_layout import portable_trunk_name
from .note_states import NoteStates
from .outputs import ParallelGenerateOutput, PDTOutput
from .pretrained import PDTPretrained
from .rollout import Rollout, run_lower_half, run_rollout, window_with_plan
from .trunk_split import TapState

# What the generation configuration takes over from the trunk's.
TRUNK_CHOICES = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample")
SAMPLING_CHOICES = ("temperature", "top_k", "top_p")


class PDTForParallelDecoding(PDTPretrained, PreTrainedModel):
    """
    A frozen causal LM whose upper layers read other streams' notes.

    Make one with [`from_trunk`] (new adapters) or [`from_pretrained`] (trained adapters).

    Args:
        config (`PDTConfig`): Trunk reference and block protocol.
        peft (`PeftModel`): The trunk with an injected PDT adapter.
    """

    config_class = PDTConfig
    base_model_prefix = "peft"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = None
    # The loss is a mean over its batch and does not read `num_items_in_batch`: `Trainer` divides by accumulated steps.
    accepts_loss_kwargs = False

    def __init__(self, config: PDTConfig, peft: PeftModel | None = None) -> None:
        if peft is None:
            raise ValueError(
                "PDTForParallelDecoding needs a trunk: use PDTForParallelDecoding.from_trunk(trunk) for new adapters, "
                "or from_pretrained(folder_or_repo) for trained ones."
            )
        super().__init__(config)
        self.peft = peft
        config.attach_adapter(peft.active_peft_config)
        choices = self.trunk.generation_config.to_dict() if self.trunk.generation_config else {}
        # A configuration that says how to sample and not that it does cannot be saved; sampling takes the trunk's.
        names = TRUNK_CHOICES + (SAMPLING_CHOICES if choices.get("do_sample") else ())
        kept = {key: choices[key] for key in names if choices.get(key) is not None}
        self.generation_config = PDTGenerationConfig(**kept)

    @classmethod
    def from_trunk(
        cls,
        trunk: nn.Module | str,
        adapter_config: PDTAdapterConfig | None = None,
        adapter_name: str = "default",
        **overrides: Any,
    ) -> "PDTForParallelDecoding":
        """
        New, untrained adapters on a trunk, which is frozen and wrapped in place.

        Args:
            trunk (`nn.Module` or `str`): A causal LM, or the name or path of one. With a Hub id the commit that was
                loaded becomes `trunk_revision`.
            adapter_config (`PDTAdapterConfig`, *optional*): Shapes and starts, be it of a saved adapter; default for
                every field.
            adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.
            overrides: Fields of `PDTAdapterConfig`, `PDTConfig` or `PDTGenerationConfig`; each goes to its owner.

        Raises:
            ValueError: For an unknown or impossible field, or a trunk that cannot be wrapped.
        """
        register_pdt()
        adapter_fields = set(PDTAdapterConfig.__dataclass_fields__) - {"target_modules", "peft_type"}
        generation_fields = set(vars(PDTGenerationConfig()))
        owned = {"adapter": {}, "model": {}, "generation": {}}
        for key, value in overrides.items():
            if key in PDTConfig.own_fields():
                owned["model"][key] = value
            elif key in adapter_fields:
                owned["adapter"][key] = value
            elif key in generation_fields:
                owned["generation"][key] = value
            else:
                raise ValueError(f"{key!r} is no field of PDTAdapterConfig, PDTConfig or PDTGenerationConfig.")
        revision = None
        if isinstance(trunk, str):
            revision = resolve_revision(trunk)
            trunk = AutoModelForCausalLM.from_pretrained(trunk, revision=revision)
        check_bare(trunk)
        values = {} if adapter_config is None else adapter_config.untrained().to_dict()
        values = {key: value for key, value in {**values, **owned["adapter"]}.items() if key != "peft_type"}
        adapter_config = PDTAdapterConfig(**values)
        PDTGenerationConfig(**owned["generation"])
        config = PDTConfig(
            **{
                "trunk_name_or_path": portable_trunk_name(trunk.config._name_or_path),
                "trunk_revision": getattr(revision, "resolved", None),
                "trunk_config": {k: v for k, v in trunk.config.to_dict().items() if k != "_name_or_path"},
                **owned["model"],
            }
        )
        model = cls(config, get_peft_model(trunk, adapter_config, adapter_name=adapter_name))
        for key, value in owned["generation"].items():
            setattr(model.generation_config, key, value)
        model.generation_config.check()
        return model

    @classmethod
    def can_generate(cls) -> bool:
        """What pipelines ask a class: yes, though by a loop of its own."""
        return True

    @property
    def trunk(self) -> nn.Module:
        """The causal LM, its stack wrapped."""
        return self.peft.get_base_model()

    @property
    def stack(self) -> PDTStack:
        """The trunk's stack with the adapters."""
        return getattr(self.trunk, self.trunk.base_model_prefix)

    def pdt_parameters(self) -> dict[str, nn.Parameter]:
        """The active adapter's parameters by name; nothing else is ever trained."""
        marker = f".{self.stack.active}."
        return {name: p for name, p in self.peft.named_parameters() if "pdt_" in name and marker in name}

    def get_input_embeddings(self) -> nn.Module:
        """The trunk's input embeddings."""
        return self.trunk.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The trunk's language-model head."""
        return self.trunk.get_output_embeddings()

    def disable_adapter(self) -> AbstractContextManager:
        """Context in which the model is its trunk."""
        return self.peft.disable_adapter()

    def check_conditioning(self) -> ConditioningCheck:
        """See [`~conditioning_check.check_conditioning`]: worth a call after loading and before training."""
        return check_conditioning(self)

    def project_notes(
        self, notes: torch.Tensor, notes_mask: torch.Tensor, gate_scale: float | torch.Tensor = 1.0
    ) -> NoteStates:
        """See [`PDTStack.project_notes`]."""
        return self.stack.project_notes(notes, notes_mask, gate_scale)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        stream_ids: torch.Tensor | None = None,
        notes: torch.Tensor | None = None,
        notes_mask: torch.Tensor | None = None,
        plan_slots: torch.Tensor | None = None,
        plan_mask: torch.Tensor | None = None,
        note_states: NoteStates | None = None,
        rollout: Rollout | None = None,
        labels: torch.Tensor | None = None,
        logits_mask: torch.Tensor | None = None,
        tap: TapState | None = None,
        gate_scale: float = 1.0,
        output_hidden_states: bool = False,
        planner_mask: torch.Tensor | None = None,
        heads_only: bool = False,
        **kwargs: Any,
    ) -> PDTOutput:
        """
        One conditioned pass of the trunk with all heads that the arguments ask for.

        Args:
            input_ids (`torch.LongTensor` of shape `[R, T]`): Tokens; not needed with `tap`.
            attention_mask (`torch.Tensor` of shape `[R, past + T]`, *optional*): 1 for real tokens.
            position_ids (`torch.LongTensor` of shape `[R, T]`, *optional*): Default: counted over real tokens.
            past_key_values (`Cache`, *optional*): Updated in place.
            stream_ids (`torch.LongTensor` of shape `[R]` or `[R, T]`, *optional*): Stream, -1 for none. Tokens without
                a stream are not conditioned. `None`: no stream adapters, notes read everywhere.
            notes (`torch.Tensor` of shape `[R, W, N]`, *optional*), notes_mask (*optional*, `[R, W]` or `[R, T, W]`):
                A ready window.
            plan_slots (`torch.LongTensor` of shape `[R, P]`, *optional*), plan_mask (*optional*, `[R, P]`): Buckets of
                the planner, 0 for none; their vectors stand before the window as snapshot 0.
            note_states (`NoteStates`, *optional*): The same, projected by [`project_notes`].
            rollout (`Rollout`, *optional*): Rows write their own notes and read their siblings'.
            labels (`torch.LongTensor` of shape `[R, T]`, *optional*): Equal to `input_ids`, -100 where not supervised.
            logits_mask (`torch.BoolTensor` of shape `[R, T]`, *optional*): Positions whose logits are wanted.
            tap (`TapState`, *optional*): Lower half of an earlier forward over the same rows.
            gate_scale (`float`, *optional*, defaults to 1.0): Multiplies the SNC gate.
            output_hidden_states (`bool`, *optional*): Return the upper layers' inputs.
            planner_mask (`torch.BoolTensor` of shape `[R, T]`, *optional*): Prompt tokens; runs the planner head.
            heads_only (`bool`, *optional*, defaults to `False`): Leave out the upper half: neither logits nor loss.
            kwargs: For the trunk's layers; what this forward does not have is a `ValueError`.
        """
        check_absent(kwargs, past_key_values)
        has_window = any(part is not None for part in (notes, notes_mask, plan_slots, plan_mask))
        if has_window + (note_states is not None) + (rollout is not None) > 1:
            raise ValueError("Give at most one of notes, note_states and rollout; plan_slots go with notes.")
        if plan_slots is not None and not self.config.plan_on_bus:
            raise ValueError("plan_slots were given, allowed: none, this model has plan_on_bus=False.")
        if tap is None:
            tap = self._embed(input_ids, attention_mask, position_ids, past_key_values, kwargs)
        stream_ids = expand_stream_ids(stream_ids, tap.hidden)
        runs_upper = not heads_only or self.stack.writer_tap == "top"
        tap = run_lower_half(self.stack, tap, rollout, stream_ids, input_ids, attention_mask, runs_upper)
        if has_window:
            window, mask = window_with_plan(self.stack, notes, notes_mask, plan_slots, plan_mask)
            note_states = self.project_notes(window, restrict_to_streams(mask, stream_ids), gate_scale)
        output = PDTOutput(tap=tap, past_key_values=past_key_values)
        if rollout is not None:
            note_states = run_rollout(self.stack, tap, rollout, stream_ids, gate_scale, output)
        if planner_mask is not None:
            output.planner_logits = self.stack.heads.planner(tap.hidden.detach(), planner_mask.bool())
        if heads_only:
            return self._anchored(output)
        collect = [] if output_hidden_states else None
        output.last_hidden_state = self.stack.upper(tap, note_states, stream_ids, collect)
        hidden = self._anchored(output).last_hidden_state
        output.hidden_states = (*collect, hidden) if output_hidden_states else None
        output.logits = self.get_output_embeddings()(hidden if logits_mask is None else hidden[logits_mask])
        if labels is not None:
            if logits_mask is not None:
                raise ValueError("labels need the logits of every position; give no logits_mask.")
            output.loss = shifted_cross_entropy(output.logits, labels)
        return output

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        layer_kwargs: dict[str, Any],
    ) -> TapState:
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.stack.embed(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            layer_kwargs=layer_kwargs,
        )

    def _anchored(self, output: PDTOutput) -> PDTOutput:
        """
        Among several processes, the output with a zero in each of its tensors that has every trainable parameter in
        its graph: they wait for each other's gradients, whichever part of the output a loss reads.
        """
        trainable = [parameter for parameter in self.pdt_parameters().values() if parameter.requires_grad]
        if trainable and torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
            anchor = 0.0 * torch.stack([parameter.sum() for parameter in trainable]).sum()
            for name, value in output.items():
                if torch.is_tensor(value):
                    output[name] = value + anchor.to(value)
        return output

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> ParallelGenerateOutput | torch.Tensor:
        """
        Writes `num_streams` sections per prompt at the same time; see [`parallel_generate`] for the arguments.

        Returns:
            [`ParallelGenerateOutput`], or its `sequences` with `return_dict_in_generate=False` (the default).
        """
        return parallel_generate(self, input_ids, **kwargs)


def check_absent(given: dict[str, Any], cache: Cache | None) -> None:
    """Refuses what a trunk's forward has and this one has not; `use_cache` says no more than a given cache does."""
    for name in ("inputs_embeds", "output_attentions", "output_router_logits"):
        value = given.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name} is not available here, got {type(value).__name__}, allowed: None.")
    if given.pop("use_cache", None) and cache is None:
        raise ValueError("use_cache=True, allowed: with past_key_values, which this forward never makes.")


def shifted_cross_entropy(logits_RTV: torch.Tensor, labels_RT: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy over labels that are not -100; 0 where there is none."""
    targets = labels_RT[:, 1:].flatten().to(logits_RTV.device)
    total = nn.functional.cross_entropy(logits_RTV[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
