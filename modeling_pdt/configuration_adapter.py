"""Configuration of the PEFT method ``PDT``: everything that shapes or initialises a parameter."""

from dataclasses import dataclass, field, replace

from peft import PeftConfig, PeftType

WRITER_TAPS = ("mid", "top")
SNC_PLACEMENTS = ("between", "after_attention")
SNC_INITS = ("trunk_space", "trunk_attention", "zero")
GATE_MODES = ("scalar", "per_head", "dynamic")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu", "tanh")
# Head names that carry a ``trained`` flag; decoding uses a head's verdict only after it was trained.
TRAINABLE_PARTS = ("snc", "stream_adapters", "writer", "encoder", "planner", "coverage", "agreement", "stream")


def check_range(owner: str, name: str, value: float, low: float, high: float | None = None) -> None:
    """Raises `ValueError` naming the field, its value and the allowed range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{owner}.{name} must be a number, got {value!r}.")
    if not (value >= low and (high is None or value <= high)):
        allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{owner}.{name} must be {allowed}, got {value!r}.")


def check_integer(owner: str, name: str, value: int, low: int, high: int | None = None) -> None:
    """Raises `ValueError` naming the field, its value and the allowed range unless it is an integer in range."""
    if isinstance(value, bool) or not isinstance(value, int):
        allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{owner}.{name} must be an integer {allowed}, got {value!r}.")
    check_range(owner, name, value, low, high)


def check_choice(owner: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` naming the field, its value and the allowed choices."""
    if value not in choices:
        raise ValueError(f"{owner}.{name} must be one of {list(choices)}, got {value!r}.")


@dataclass
class PDTAdapterConfig(PeftConfig):
    """
    Configuration of the notes bus adapters that PDT adds to a frozen trunk.

    Args:
        num_streams (`int`, *optional*, defaults to 3):
            Streams that the stream adapters and the stream head are trained with; free at run time.
        notes_dim (`int`, *optional*):
            Width of a note. Defaults to the trunk's width; a smaller width uses an orthogonal projection.
        notes_per_block (`int`, *optional*, defaults to 4):
            Notes that a stream writes at the end of each block.
        instrumented_layers (`int` or `list[int]`, *optional*):
            Number of top layers, or explicit layer indices, that read the bus. Defaults to a third of the layers,
            at least two (all when the trunk has one layer).
        writer_tap (`str`, *optional*, defaults to `"mid"`):
            States of its block that a stream writes its notes from. `"mid"`: the input of the first instrumented
            layer, which no note reaches. `"top"`: the last hidden states, which hold what the stream has read, at the
            price of one more upper half per block boundary in decoding and per forward with a `rollout` in training.
        snc_heads (`int`, *optional*):
            Attention heads of shared-notes cross-attention. Defaults to the largest power of two, at most the
            trunk's number of attention heads, that divides the trunk's width; `snc_init="trunk_attention"` needs the
            trunk's own number.
        snc_placement (`str`, *optional*, defaults to `"between"`):
            `"between"`: SNC acts between layers, on the input of every instrumented layer and on the output of the
            last one. `"after_attention"`: inside every instrumented layer, on the residual stream after attention and
            before the norm of the MLP; needs decoder layers of the usual pre-norm form.
        snc_init (`str`, *optional*, defaults to `"trunk_space"`):
            `"trunk_space"`: projections start as (sub-)identities, so that a note acts as a trunk state.
            `"trunk_attention"`: SNC before (or in) a layer starts from that layer's own attention, see
            [`~modeling_pdt.attention_start.start_from_attention`]; after the last layer, in trunk space. Needs as
            many `snc_heads` as the trunk has.
            `"zero"`: in trunk space with the output projection at zero, so that the model starts as its trunk.
        spectral_norm (`float`, *optional*):
            Largest singular value that the start and every training step leave to the matrices of SNC, of the stream
            adapters and of the agreement head's reader; 1 and above leaves the trunk-space start as it is.
            Defaults to no limit.
        gate_mode (`str`, *optional*, defaults to `"scalar"`):
            `"scalar"`, `"per_head"`, or `"dynamic"` (per head and token, a zero-initialised linear map on top).
        gate_init (`float`, *optional*, defaults to 0.0):
            Initial gate logit; the gate is its sigmoid.
        adapter_bottleneck (`int`, *optional*, defaults to 32):
            Inner width of the stream adapters, whose output projection starts at zero.
        adapter_activation (`str`, *optional*, defaults to `"gelu_pytorch_tanh"`):
            Their activation, one of `ACTIVATIONS`.
        adapter_dropout (`float`, *optional*, defaults to 0.0):
            Share of their inner values dropped in training, in [0, 1).
        num_plan_slots (`int`, *optional*, defaults to 8):
            Slots that the planner head predicts.
        plan_vocab_size (`int`, *optional*, defaults to 512):
            Hash buckets of plan items.
        plan_dim (`int`, *optional*, defaults to 64):
            Rank of the plan embedding shared by the planner and snapshot 0.
        trained_parts (`list[str]`, *optional*):
            Parts that have been trained, of `TRAINABLE_PARTS`; written by the trainer.
        trunk_hidden_size, trunk_num_layers (`int`, *optional*):
            Shape of the trunk, filled in when the adapter is injected and checked when it is loaded.
        target_modules (`str` or `list[str]`, *optional*):
            Name of the trunk's stack of decoder layers, filled in when the adapter is injected.
        exclude_modules (`str` or `list[str]`, *optional*):
            PEFT reads it; without effect here, where one module is wrapped.
    """

    num_streams: int = field(default=3, metadata={"help": "Streams trained with."})
    notes_dim: int | None = field(default=None, metadata={"help": "Width of a note; default: the trunk's width."})
    notes_per_block: int = field(default=4, metadata={"help": "Notes written at the end of each block."})
    instrumented_layers: int | list[int] | None = field(
        default=None, metadata={"help": "Count of top layers or explicit layer indices that read the bus."}
    )
    writer_tap: str = field(default="mid", metadata={"help": "States that notes are written from: mid or top."})
    snc_heads: int | None = field(default=None, metadata={"help": "Heads of shared-notes cross-attention."})
    snc_placement: str = field(default="between", metadata={"help": "between or after_attention."})
    snc_init: str = field(default="trunk_space", metadata={"help": "trunk_space, trunk_attention or zero."})
    spectral_norm: float | None = field(
        default=None, metadata={"help": "Largest singular value of the matrices of SNC and stream adapters."}
    )
    gate_mode: str = field(default="scalar", metadata={"help": "scalar, per_head or dynamic."})
    gate_init: float = field(default=0.0, metadata={"help": "Initial gate logit."})
    adapter_bottleneck: int = field(default=32, metadata={"help": "Inner width of the stream adapters."})
    adapter_activation: str = field(default="gelu_pytorch_tanh", metadata={"help": "Activation in stream adapters."})
    adapter_dropout: float = field(default=0.0, metadata={"help": "Dropout in stream adapters."})
    num_plan_slots: int = field(default=8, metadata={"help": "Slots of the planner head."})
    plan_vocab_size: int = field(default=512, metadata={"help": "Hash buckets of plan items."})
    plan_dim: int = field(default=64, metadata={"help": "Rank of the plan embedding."})
    trained_parts: list[str] = field(default_factory=list, metadata={"help": "Parts that have been trained."})
    trunk_hidden_size: int | None = field(default=None, metadata={"help": "Width of the trunk (filled in)."})
    trunk_num_layers: int | None = field(default=None, metadata={"help": "Layers of the trunk (filled in)."})
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Name of the trunk's stack of decoder layers (filled in)."}
    )
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "Unused; PEFT reads it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # A plain name until the method is registered, see `register_pdt`; both read the same in a file.
        self.peft_type = PeftType.__members__.get("PDT", "PDT")
        owner = type(self).__name__
        for name in ("num_streams", "notes_per_block", "adapter_bottleneck", "num_plan_slots", "plan_dim"):
            check_integer(owner, name, getattr(self, name), 1)
        check_integer(owner, "plan_vocab_size", self.plan_vocab_size, 2)
        for name in ("notes_dim", "snc_heads"):
            if getattr(self, name) is not None:
                check_integer(owner, name, getattr(self, name), 1)
        check_choice(owner, "writer_tap", self.writer_tap, WRITER_TAPS)
        check_choice(owner, "snc_placement", self.snc_placement, SNC_PLACEMENTS)
        check_choice(owner, "snc_init", self.snc_init, SNC_INITS)
        if self.spectral_norm is not None:
            check_range(owner, "spectral_norm", self.spectral_norm, 1e-3, 1e3)
        check_choice(owner, "gate_mode", self.gate_mode, GATE_MODES)
        check_range(owner, "gate_init", self.gate_init, -20, 20)
        check_choice(owner, "adapter_activation", self.adapter_activation, ACTIVATIONS)
        if not 0 <= self.adapter_dropout < 1:
            raise ValueError(f"{owner}.adapter_dropout must be in [0, 1), got {self.adapter_dropout!r}.")
        for part in self.trained_parts:
            check_choice(owner, "trained_parts", part, TRAINABLE_PARTS)
        self._check_layers()

    def _check_layers(self) -> None:
        layers = self.instrumented_layers
        if layers is None:
            return
        if isinstance(layers, int) and not isinstance(layers, bool):
            check_range(type(self).__name__, "instrumented_layers", layers, 1)
        elif not isinstance(layers, (list, tuple)) or not layers or len(set(layers)) != len(layers):
            raise ValueError(
                f"{type(self).__name__}.instrumented_layers must be a count >= 1 or a list of distinct layer indices, "
                f"got {layers!r}."
            )
        else:
            for index in layers:
                check_integer(type(self).__name__, "instrumented_layers", index, 0)
            self.instrumented_layers = sorted(layers)

    def untrained(self) -> "PDTAdapterConfig":
        """The same shapes and starts for new parameters, also when this configuration is that of a saved adapter."""
        return replace(self, trained_parts=[], inference_mode=False)

    def resolve(self, hidden_size: int, num_layers: int, num_heads: int) -> None:
        """
        Fills in what depends on the trunk, or checks it when it is already there.

        Args:
            hidden_size (`int`): Width of the trunk.
            num_layers (`int`): Decoder layers of the trunk.
            num_heads (`int`): Attention heads of the trunk, the default number of SNC heads.

        Raises:
            ValueError: When the configuration was made for a trunk of another shape.
        """
        for name, value in (("trunk_hidden_size", hidden_size), ("trunk_num_layers", num_layers)):
            known = getattr(self, name)
            if known is not None and known != value:
                raise ValueError(f"{type(self).__name__}.{name} is {known}, but the trunk given has {value}.")
            setattr(self, name, value)
        if self.notes_dim is None:
            self.notes_dim = hidden_size
        check_range(type(self).__name__, "notes_dim", self.notes_dim, 1, hidden_size)
        if self.snc_heads is None:
            self.snc_heads = num_heads
            while hidden_size % self.snc_heads or self.snc_heads & (self.snc_heads - 1):
                self.snc_heads -= 1
        if hidden_size % self.snc_heads:
            raise ValueError(
                f"{type(self).__name__}.snc_heads must divide the trunk's width {hidden_size}, got {self.snc_heads}."
            )
        layers = self.instrumented_layers
        if layers is None:
            layers = min(num_layers, max(2, -(-num_layers // 3)))
        if isinstance(layers, int):
            check_range(type(self).__name__, "instrumented_layers", layers, 1, num_layers)
            layers = list(range(num_layers - layers, num_layers))
        for index in layers:
            check_range(type(self).__name__, "instrumented_layers", index, 0, num_layers - 1)
        self.instrumented_layers = list(layers)
