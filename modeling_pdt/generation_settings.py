"""Choices of a parallel decoding call with every default resolved."""

import logging
from dataclasses import dataclass
from typing import Any

from .configuration_generation import POLICIES, PDTGenerationConfig
from .policies import CadencePolicy, FlickerGuard, GateAnnealing, SensitivityProbe, make_policy

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256
# Rounds without which a way of retention has no place for what it is there for.
SMALLEST_CAPACITY = {"fifo": 1, "scored": 2, "compressed": 2, "hybrid": 3}


@dataclass(frozen=True)
class Settings:
    """Choices of one call with every default resolved; names as in [`PDTGenerationConfig`]."""

    num_streams: int
    block_size: int
    commit_horizon: int
    cadence: CadencePolicy
    bus_lag: int
    bus_capacity: int
    retention: str
    retention_score: str
    bus_dtype: str
    topology: list[tuple[int, int]] | None
    self_notes: bool
    self_only_rounds: int
    max_retries: int
    retry_policy: str
    retry_temperature: float
    commit_policy: str
    agreement_threshold: float | None
    gate_scale: float
    gate_annealing: GateAnnealing | None
    flicker_guard: FlickerGuard | None
    sensitivity_probe: SensitivityProbe | None
    logit_blend: float
    coverage_threshold: float
    max_new_tokens: int
    do_sample: bool
    seed: int
    eos_ids: tuple[int, ...]
    pad_id: int
    # Calls that were stored before there was one have none.
    agreement_scaling: list[float] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Settings from what `dataclasses.asdict` made of them, JSON's lists included."""
        policies = {name: make_policy(kind, name, values[name]) for name, kind in POLICIES.items()}
        return cls(**{**values, **policies, "eos_ids": tuple(values["eos_ids"])})


def end_and_pad(config: PDTGenerationConfig) -> tuple[tuple[int, ...], int]:
    """Tokens that end a row, and the one that fills it up: the first of these, or 0, where none is named."""
    eos, pad = config.eos_token_id, config.pad_token_id
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    if not all(isinstance(token, int) for token in eos_ids):
        raise ValueError(f"eos_token_id must be an integer or a list of integers, got {eos!r}.")
    if pad is None:
        pad = eos_ids[0] if eos_ids else 0
    if not isinstance(pad, int) or pad < 0:
        raise ValueError(f"pad_token_id must be an integer >= 0, got {pad!r}.")
    return eos_ids, pad


def resolve_settings(model: Any, config: PDTGenerationConfig, num_streams: int, seed: int) -> Settings:
    """`None` replaced by the values in the model's configuration; the gate is off while the head is untrained."""

    def value(name: str) -> Any:
        chosen = getattr(config, name)
        return getattr(model.config, name) if chosen is None else chosen

    threshold = config.agreement_threshold
    if threshold is not None and "agreement" not in model.config.trained_parts:
        logger.warning("agreement_threshold=%s is ignored: the agreement head is not trained.", threshold)
        threshold = None
    if value("block_size") > value("commit_horizon"):
        raise ValueError(
            f"block_size must be in [1, commit_horizon={value('commit_horizon')}], got {value('block_size')}."
        )
    capacity, least = value("bus_capacity"), SMALLEST_CAPACITY[config.retention]
    if capacity < least:
        raise ValueError(f"bus_capacity must be >= {least} with retention={config.retention!r}, got {capacity}.")
    eos_ids, pad = end_and_pad(config)
    return Settings(
        num_streams=num_streams,
        block_size=value("block_size"),
        commit_horizon=value("commit_horizon"),
        bus_lag=value("bus_lag"),
        bus_capacity=capacity,
        retention=config.retention,
        retention_score=config.retention_score,
        bus_dtype=config.bus_dtype,
        topology=config.topology,
        self_notes=config.self_notes,
        self_only_rounds=config.self_only_rounds,
        max_retries=config.max_retries,
        retry_policy=config.retry_policy,
        retry_temperature=config.retry_temperature,
        commit_policy=config.commit_policy,
        agreement_threshold=threshold,
        agreement_scaling=config.agreement_scaling,
        gate_scale=config.gate_scale,
        logit_blend=config.logit_blend,
        coverage_threshold=config.coverage_threshold,
        max_new_tokens=config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        do_sample=bool(config.do_sample),
        seed=seed,
        eos_ids=eos_ids,
        pad_id=int(pad),
        **resolve_policies(model, config, threshold),
    )


def resolve_policies(model: Any, config: PDTGenerationConfig, threshold: float | None) -> dict[str, Any]:
    """
    The groups of options.

    Raises:
        ValueError: For one that follows the agreement, or its gate, where there is none.
    """
    policies = {name: make_policy(kind, name, getattr(config, name)) for name, kind in POLICIES.items()}
    policies["cadence"] = policies["cadence"] or CadencePolicy()
    if policies["cadence"].mode == "adaptive" and "agreement" not in model.config.trained_parts:
        raise ValueError("cadence.mode='adaptive' follows the agreement head, which is not trained.")
    annealing = policies["gate_annealing"]
    if annealing is not None and threshold is None:
        raise ValueError("gate_annealing follows the commit gate: it needs a trained head and agreement_threshold.")
    if annealing is not None and annealing.min_value > config.gate_scale:
        raise ValueError(
            f"gate_annealing.min_value must be in [0, gate_scale={config.gate_scale}], got {annealing.min_value}."
        )
    guard = policies["flicker_guard"]
    if guard is not None and annealing is None and guard.max_switches is None:
        raise ValueError(
            "flicker_guard watches an annealed gate or plan items: it needs gate_annealing or max_switches."
        )
    return policies
