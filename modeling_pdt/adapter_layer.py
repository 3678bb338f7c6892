"""The trunk's stack of decoder layers with PDT's parameters beside it: one PEFT layer around the whole stack."""

from functools import lru_cache, partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

from .attention_start import start_from_attention
from .configuration_adapter import PDTAdapterConfig
from .heads import PDTHeads
from .note_states import NoteStates, equal_runs
from .snc import SharedNotesCrossAttention, StreamAdapter
from .spectral_norm import limit_spectral_norm
from .trunk_split import TapState, run_lower, run_on, run_upper, share_prefix


class PDTStack(nn.Module, BaseTunerLayer):
    """
    Runs the frozen stack in two halves and conditions the upper one on notes and streams.

    SNC acts where `snc_placement` says: between layers, or inside the instrumented ones. A stream adapter acts on the
    output of every instrumented layer; between layers it comes before SNC. All three containers are keyed by adapter
    name.

    Args:
        base_layer (`nn.Module`): The trunk's stack.
        adapter_name (`str`), config (`PDTAdapterConfig`): First adapter.
    """

    adapter_layer_names = ("pdt_snc", "pdt_stream_adapters", "pdt_heads")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PDTAdapterConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.pdt_snc = nn.ModuleDict()
        self.pdt_stream_adapters = nn.ModuleDict()
        self.pdt_heads = nn.ModuleDict()
        self.pdt_configs: dict[str, PDTAdapterConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: PDTAdapterConfig) -> None:
        """Adds the parameters of a named adapter."""
        width = config.trunk_hidden_size
        sites = len(self._sites(config))
        self.pdt_configs[adapter_name] = config
        heads = PDTHeads(config)
        self.pdt_heads[adapter_name] = heads
        self.pdt_snc[adapter_name] = nn.ModuleList(
            SharedNotesCrossAttention(
                width, config.notes_dim, config.snc_heads, config.gate_mode, config.gate_init, config.snc_init
            )
            for _ in range(sites)
        )
        projection = heads.writer.out.weight.detach()
        for site, snc in zip(self._sites(config), self.pdt_snc[adapter_name], strict=True):
            snc.reset_parameters(config.snc_init, projection)
            # After the last layer there is no attention to start from; what was trained comes from a file.
            has_start = site < len(self.base_layer.layers) and not config.trained_parts
            if config.snc_init == "trunk_attention" and has_start:
                start_from_attention(snc, self.base_layer.layers[site], projection, f"layer {site}")
        heads.agreement.reader.reset_parameters("trunk_space", projection)
        self.pdt_stream_adapters[adapter_name] = nn.ModuleList(
            StreamAdapter(
                config.num_streams, width, config.adapter_bottleneck, config.adapter_activation, config.adapter_dropout
            )
            for _ in config.instrumented_layers
        )
        self.limit_spectral_norm(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or next(self.base_layer.parameters()).device
        for container in self.adapter_layer_names:
            module = getattr(self, container)[adapter_name]
            if not any(parameter.is_meta for parameter in module.parameters()) and device.type != "meta":
                module.to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes a named adapter and activates a remaining one."""
        super().delete_adapter(adapter_name)
        self.pdt_configs.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Conditioning depends on notes and streams; it cannot become part of the trunk's weights."""
        raise NotImplementedError("PDT adapters cannot be merged into the trunk; use unload() to get the trunk back.")

    def unmerge(self) -> None:
        """There is nothing to take back, see [`merge`]."""
        raise NotImplementedError("PDT adapters are never merged into the trunk; use unload() to get the trunk back.")

    @staticmethod
    def _sites(config: PDTAdapterConfig) -> list[int]:
        """Where SNC acts. Between layers: i is the input of layer i. After attention: i is inside layer i."""
        layers = config.instrumented_layers
        return layers if config.snc_placement == "after_attention" else [*layers, layers[-1] + 1]

    @property
    def active(self) -> str:
        """Name of the one active adapter."""
        names = self.active_adapters
        if len(names) != 1:
            raise ValueError(f"exactly one PDT adapter must be active, got {names}.")
        return names[0]

    def limit_spectral_norm(self, adapter_name: str) -> None:
        """Scales down the matrices of SNC and of the stream adapters that exceed the adapter's `spectral_norm`."""
        limit = self.pdt_configs[adapter_name].spectral_norm
        if limit is None:
            return
        for snc in (*self.pdt_snc[adapter_name], self.pdt_heads[adapter_name].agreement.reader):
            for linear in (snc.q_proj, snc.k_proj, snc.v_proj, snc.o_proj):
                limit_spectral_norm(linear.weight, limit)
        for module in self.pdt_stream_adapters[adapter_name]:
            limit_spectral_norm(module.down, limit)
            limit_spectral_norm(module.up, limit)

    @property
    def split(self) -> int:
        """Index of the first instrumented layer: the tap is its input."""
        return self.pdt_configs[self.active].instrumented_layers[0]

    @property
    def writer_tap(self) -> str:
        """States that the active adapter's writer reads, see [`PDTAdapterConfig`]."""
        return self.pdt_configs[self.active].writer_tap

    @property
    def heads(self) -> PDTHeads:
        """Heads of the active adapter."""
        return self.pdt_heads[self.active]

    @property
    def snc(self) -> nn.ModuleList:
        """SNC sites of the active adapter, from the lowest up."""
        return self.pdt_snc[self.active]

    def project_notes(
        self, notes: torch.Tensor, mask: torch.Tensor, gate_scale: float | torch.Tensor = 1.0
    ) -> NoteStates:
        """
        Projects a window of notes for every SNC site. Without gradients, adjacent windows that are equal are projected
        once.

        Args:
            notes (`torch.Tensor` of shape `[G, W, N]`): Window shared by R / G adjacent rows.
            mask (`torch.BoolTensor` of shape `[R, W]` or `[R, T, W]`): Visible notes.
            gate_scale (`float` or `torch.Tensor` of shape `[R]`, *optional*, defaults to 1.0): Multiplies the gate.

        Raises:
            ValueError: When the width or the number of notes does not fit.
        """
        notes_dim = self.pdt_configs[self.active].notes_dim
        if notes.dim() != 3 or notes.shape[-1] != notes_dim:
            raise ValueError(f"notes must have shape [rows, window, notes_dim={notes_dim}], got {list(notes.shape)}.")
        if mask.shape[-1] != notes.shape[1] or mask.shape[0] % notes.shape[0]:
            raise ValueError(
                f"notes_mask must have shape [rows, window={notes.shape[1]}] or [rows, tokens, window], "
                f"got {list(mask.shape)}."
            )
        runs = None if torch.is_grad_enabled() else equal_runs(notes)
        windows = notes if runs is None else notes.index_select(0, runs[0])
        projected = [snc.project(windows) for snc in self.snc]
        keys, values = (tuple(part) for part in zip(*projected, strict=True))
        if runs is not None:
            keys, values = (tuple(site.index_select(0, runs[1]) for site in part) for part in (keys, values))
        return NoteStates(keys, values, mask.bool(), mask.shape[0] // notes.shape[0], gate_scale)

    def lower(self, **inputs: Any) -> TapState:
        """[`run_lower`] up to the first instrumented layer."""
        return run_lower(self.base_layer, self.split, **inputs)

    def embed(self, **inputs: Any) -> TapState:
        """[`run_lower`] before any layer, for [`lower_from`] or [`share_prefix`]."""
        return run_lower(self.base_layer, 0, **inputs)

    def lower_from(self, tap: TapState) -> TapState:
        """See [`run_on`]: up to the first instrumented layer."""
        return run_on(self.base_layer, tap, self.split)

    def share_prefix(self, tap: TapState, *choices: Any) -> TapState:
        """See [`share_prefix`]."""
        return share_prefix(self.base_layer, tap, self.split, *choices)

    def upper(
        self,
        tap: TapState,
        note_states: NoteStates | None = None,
        stream_ids: torch.Tensor | None = None,
        collect: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        The upper half, conditioned. A prefix that the tap knows is not computed again, unless something conditions it
        or `collect` wants its states.

        Args:
            tap (`TapState`): From [`lower`].
            note_states (`NoteStates`, *optional*): What the rows read. `None`: nothing.
            stream_ids (`torch.LongTensor` of shape `[R, T]`, *optional*): Stream of each token, -1 for none. `None`:
                no stream adapter.
            collect (`list`, *optional*): Receives the input of every upper layer.
        """
        if tap.prefix is not None and collect is None:
            columns = tap.prefix.output.shape[1]
            bare = self.disable_adapters or (note_states is None and stream_ids is None)
            if bare or (note_states is not None and note_states.first_reader >= columns):
                notes = None if bare else note_states.after(columns)
                streams = None if bare or stream_ids is None else stream_ids[:, columns:]
                return torch.cat([tap.prefix.output, self.upper(tap.prefix.rest, notes, streams)], dim=1)
        if self.disable_adapters:
            return run_upper(self.base_layer, tap, collect=collect)
        config = self.pdt_configs[self.active]
        acts, reads = {}, {}
        if stream_ids is not None:
            modules = self.pdt_stream_adapters[self.active]
            outputs = (layer + 1 for layer in config.instrumented_layers)
            acts = {
                place: partial(module, stream_RT=stream_ids) for place, module in zip(outputs, modules, strict=True)
            }
        if note_states is not None:
            sites = enumerate(zip(self._sites(config), self.snc, strict=True))
            reads = {place: partial(snc, note_states=note_states, site=site) for site, (place, snc) in sites}
        after_attention = config.snc_placement == "after_attention"

        def between(boundary: int, hidden: torch.Tensor) -> torch.Tensor:
            if boundary in acts:
                hidden = acts[boundary](hidden)
            if boundary in reads and not after_attention:
                hidden = reads[boundary](hidden)
            return hidden

        return run_upper(self.base_layer, tap, between, collect, reads if after_attention else None)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        notes: torch.Tensor | None = None,
        notes_mask: torch.Tensor | None = None,
        stream_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        The trunk's stack as its causal LM calls it, with notes, notes_mask and stream_ids as further keywords.

        Without any of the three, or with adapters disabled, this is the trunk's own forward.
        """
        if self.disable_adapters or (notes is None and stream_ids is None):
            return self.base_layer(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        wants_states = kwargs.pop("output_hidden_states", None)
        for name in ("output_router_logits", "output_attentions", "return_dict"):
            if kwargs.pop(name, None) and name != "return_dict":
                raise ValueError(f"{name} is not available together with notes or stream_ids.")
        if use_cache and past_key_values is None:
            raise ValueError("use_cache with notes or stream_ids needs past_key_values.")
        tap = self.lower(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            layer_kwargs=kwargs,
        )
        stream_ids = expand_stream_ids(stream_ids, tap.hidden)
        note_states = None
        if notes is not None:
            if notes_mask is None:
                notes_mask = torch.ones(notes.shape[:2], dtype=torch.bool, device=notes.device)
            note_states = self.project_notes(notes, restrict_to_streams(notes_mask, stream_ids))
        collect = [] if wants_states else None
        hidden = self.upper(tap, note_states, stream_ids, collect)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*collect, hidden) if wants_states else None,
        )


@lru_cache(maxsize=1)
def parameter_path_components() -> frozenset[str]:
    """Every component of the parameter names of an adapter."""
    config = PDTAdapterConfig(
        notes_dim=4, snc_heads=1, gate_mode="dynamic", instrumented_layers=[0], trunk_hidden_size=4, trunk_num_layers=1
    )
    # Drawing parameters that nobody uses must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        modules = [
            PDTHeads(config),
            SharedNotesCrossAttention(4, 4, 1, "dynamic", 0.0, "zero"),
            StreamAdapter(1, 4, 1, config.adapter_activation, config.adapter_dropout),
        ]
    return frozenset(part for module in modules for name, _ in module.named_parameters() for part in name.split("."))


def expand_stream_ids(stream_ids: torch.Tensor | None, hidden_RTD: torch.Tensor) -> torch.Tensor | None:
    """Stream ids `[R]` or `[R, T]` as `[R, T]`."""
    if stream_ids is None or stream_ids.dim() == 2:
        return stream_ids
    return stream_ids[:, None].expand(hidden_RTD.shape[:2])


def restrict_to_streams(notes_mask: torch.Tensor, stream_ids: torch.Tensor | None) -> torch.Tensor:
    """Notes are read only by tokens of a stream: combines a mask `[R, W]` or `[R, T, W]` with ids `[R, T]`."""
    notes_mask = notes_mask.bool()
    if stream_ids is None:
        return notes_mask
    notes_mask = notes_mask[:, None, :] if notes_mask.dim() == 2 else notes_mask
    return notes_mask & (stream_ids >= 0)[:, :, None]
