"""Choices of one parallel decoding call, saved in ``generation_config.json``."""

from typing import Any

from transformers import GenerationConfig

from .configuration_adapter import check_choice, check_integer, check_range
from .policies import CadencePolicy, FlickerGuard, GateAnnealing, SensitivityProbe, make_policy
from .retention import RETENTION_MODES, RETENTION_SCORES

PLAN_SOURCES = ("trunk", "planner", None)
RETRY_POLICIES = ("refresh", "stale")
COMMIT_POLICIES = ("stream", "round", "stall")
BUS_DTYPES = ("float32", "bfloat16", "float16")
# Fields that are groups of options.
POLICIES = {
    "cadence": CadencePolicy,
    "gate_annealing": GateAnnealing,
    "flicker_guard": FlickerGuard,
    "sensitivity_probe": SensitivityProbe,
}
INHERITED_FIELDS = frozenset(vars(GenerationConfig()))


class PDTGenerationConfig(GenerationConfig):
    """
    `GenerationConfig` with the choices of parallel decoding. `None` means the value in the model's configuration.

    Args:
        num_streams (`int`, *optional*): Streams per prompt. Defaults to the number trained with.
        plan (`str`, *optional*): `"trunk"` (the trunk writes an outline), `"planner"` (the planner head), or `None`
            (no plan, unless `plan_texts` are given).
        block_size (`int`, *optional*): Tokens per block.
        commit_horizon (`int`, *optional*): Tokens of the longest block, which may be withdrawn.
        cadence (`dict`, *optional*): Fields of [`CadencePolicy`]. `None`: blocks of `block_size`.
        bus_lag (`int`, *optional*): Rounds between writing and reading.
        bus_capacity (`int`, *optional*): Rounds kept readable.
        retention (`str`, *optional*, defaults to `"fifo"`): Which rounds these are: `"fifo"`, `"scored"`,
            `"compressed"` or `"hybrid"`; see [`retained_places`].
        retention_score (`str`, *optional*, defaults to `"novelty"`): By what `"scored"` and `"hybrid"` keep older
            rounds: the `"novelty"` of their notes, or the `"attention"` that these got from readers; see
            [`~readings.ReceivedAttention`].
        bus_dtype (`str`, *optional*, defaults to `"float32"`): In which notes are stored: `"float32"`, `"bfloat16"` or
            `"float16"`.
        topology (`list[tuple[int, int]]`, *optional*): Edges (writer, reader) between streams. `None`: every stream
            reads every sibling.
        self_notes (`bool`, *optional*, defaults to `False`): A stream reads its own notes of earlier rounds too.
        self_only_rounds (`int`, *optional*, defaults to 0): First rounds in which a stream reads its own notes only.
        max_retries (`int`, *optional*, defaults to 1): Times a block may be withdrawn and written again, or may wait.
        retry_policy (`str`, *optional*, defaults to `"refresh"`): `"refresh"`: a rewriting reads the siblings' newest
            notes, of its own round too; `"stale"`: it reads what the first writing read (a control).
        retry_temperature (`float`, *optional*, defaults to 0.5): Factor of the sampling temperature at every attempt,
            from the second retry of a block on.
        commit_policy (`str`, *optional*, defaults to `"stream"`): `"stream"`: every block is judged for itself.
            `"round"`: blocks of one prompt that end together stand or fall together, by the lowest agreement.
            `"stall"`: a block that disagrees is not withdrawn; its stream waits for notes that the streams it reads
            write next and is judged again by them, up to `max_retries` times.
        agreement_threshold (`float`, *optional*): A block whose agreement is below is withdrawn. `None`: gate off.
        agreement_scaling (`list[float]`, *optional*): `[slope, intercept]` of the agreement head's logit, so that an
            agreement of 0.9 means that 9 of 10 such blocks may stand (Platt scaling). `None`: the logit as it is.
        gate_scale (`float`, *optional*, defaults to 1.0): Multiplies the SNC gate; 0 silences it.
        gate_annealing (`dict`, *optional*): Fields of [`GateAnnealing`]. `None`: the gate scale stays.
        flicker_guard (`dict`, *optional*): Fields of [`FlickerGuard`], for an annealed gate or a plan.
        sensitivity_probe (`dict`, *optional*): Fields of [`SensitivityProbe`]. `None`: nothing is measured.
        logit_blend (`float`, *optional*, defaults to 1.0): Share of the conditioned logits; the rest are those of the
            bare trunk on the same tokens. Between 0 and 1 the upper half runs twice.
        coverage_threshold (`float`, *optional*, defaults to 0.5): An item at or above counts as covered.
        outline_max_new_tokens (`int`, *optional*, defaults to 192): Budget of the outline of `plan="trunk"`.
        kwargs: Fields of `GenerationConfig`.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.num_streams = kwargs.pop("num_streams", None)
        self.plan = kwargs.pop("plan", None)
        self.block_size = kwargs.pop("block_size", None)
        self.bus_lag = kwargs.pop("bus_lag", None)
        self.bus_capacity = kwargs.pop("bus_capacity", None)
        self.retention = kwargs.pop("retention", "fifo")
        self.retention_score = kwargs.pop("retention_score", "novelty")
        self.bus_dtype = kwargs.pop("bus_dtype", "float32")
        self.topology = kwargs.pop("topology", None)
        self.self_notes = kwargs.pop("self_notes", False)
        self.self_only_rounds = kwargs.pop("self_only_rounds", 0)
        self.commit_horizon = kwargs.pop("commit_horizon", None)
        self.cadence = kwargs.pop("cadence", None)
        self.max_retries = kwargs.pop("max_retries", 1)
        self.retry_temperature = kwargs.pop("retry_temperature", 0.5)
        self.commit_policy = kwargs.pop("commit_policy", "stream")
        self.retry_policy = kwargs.pop("retry_policy", "refresh")
        self.agreement_threshold = kwargs.pop("agreement_threshold", None)
        self.agreement_scaling = kwargs.pop("agreement_scaling", None)
        self.gate_scale = kwargs.pop("gate_scale", 1.0)
        self.gate_annealing = kwargs.pop("gate_annealing", None)
        self.flicker_guard = kwargs.pop("flicker_guard", None)
        self.sensitivity_probe = kwargs.pop("sensitivity_probe", None)
        self.logit_blend = kwargs.pop("logit_blend", 1.0)
        self.coverage_threshold = kwargs.pop("coverage_threshold", 0.5)
        self.outline_max_new_tokens = kwargs.pop("outline_max_new_tokens", 192)
        unknown = [key for key in kwargs if key not in INHERITED_FIELDS and not key.startswith("_")]
        if unknown:
            raise ValueError(f"PDTGenerationConfig does not know {sorted(unknown)}.")
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raises `ValueError` for an impossible value, naming field, value and range."""
        owner = "PDTGenerationConfig"
        for name in ("num_streams", "block_size", "commit_horizon", "bus_lag", "bus_capacity"):
            if getattr(self, name) is not None:
                check_integer(owner, name, getattr(self, name), 1)
        if self.max_new_tokens is not None:
            check_integer(owner, "max_new_tokens", self.max_new_tokens, 1)
        check_integer(owner, "max_retries", self.max_retries, 0)
        check_range(owner, "retry_temperature", self.retry_temperature, 0.01, 10)
        check_choice(owner, "commit_policy", self.commit_policy, COMMIT_POLICIES)
        check_range(owner, "gate_scale", self.gate_scale, 0, 10)
        check_range(owner, "logit_blend", self.logit_blend, 0, 1)
        check_range(owner, "coverage_threshold", self.coverage_threshold, 0, 1)
        check_integer(owner, "outline_max_new_tokens", self.outline_max_new_tokens, 1)
        if self.agreement_threshold is not None:
            check_range(owner, "agreement_threshold", self.agreement_threshold, 0, 1)
        self._check_scaling(owner)
        check_choice(owner, "plan", self.plan, PLAN_SOURCES)
        self._check_bus(owner)
        for name, kind in POLICIES.items():
            make_policy(kind, f"{owner}.{name}", getattr(self, name))
        check_choice(owner, "retry_policy", self.retry_policy, RETRY_POLICIES)

    def _check_scaling(self, owner: str) -> None:
        name, scaling = "agreement_scaling", self.agreement_scaling
        if scaling is None:
            return
        if not isinstance(scaling, (list, tuple)) or len(scaling) != 2:
            raise ValueError(f"{owner}.{name} must be None or [slope, intercept], got {scaling!r}.")
        check_range(owner, f"{name}[0]", scaling[0], 0.001, 1000)
        check_range(owner, f"{name}[1]", scaling[1], -1000, 1000)

    def _check_bus(self, owner: str) -> None:
        check_choice(owner, "retention", self.retention, RETENTION_MODES)
        check_choice(owner, "retention_score", self.retention_score, RETENTION_SCORES)
        if self.retention_score != "novelty" and self.retention not in ("scored", "hybrid"):
            raise ValueError(
                f"{owner}.retention_score={self.retention_score!r} needs retention='scored' or 'hybrid', "
                f"got {self.retention!r}."
            )
        check_choice(owner, "bus_dtype", self.bus_dtype, BUS_DTYPES)
        check_choice(owner, "self_notes", self.self_notes, (True, False))
        check_integer(owner, "self_only_rounds", self.self_only_rounds, 0)
        edges = self.topology if isinstance(self.topology, (list, tuple)) else [self.topology]
        if self.topology is not None and not all(map(is_edge, edges)):
            raise ValueError(f"{owner}.topology must be a list of edges (writer, reader), got {self.topology!r}.")


def is_edge(value: Any) -> bool:
    """Whether a value is a pair of stream numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(part) is int for part in value)
