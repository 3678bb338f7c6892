"""Options of a call that are groups of numbers: checked dataclasses, written as mappings in configurations.

Each class says what its numbers do; the objects that the loop calls are in `cadence`, `gate_scale` and `safeguards`.
"""

from dataclasses import dataclass, fields
from typing import Any

from .configuration_adapter import check_choice, check_integer, check_range

CADENCE_MODES = ("deterministic", "stochastic", "adaptive")


@dataclass(frozen=True)
class CadencePolicy:
    """
    After how many tokens a stream ends its block: writes notes, is judged and commits.

    Args:
        mode (`str`): `"deterministic"`: after M tokens. `"stochastic"`: after every token with probability 1 / M.
            `"adaptive"`: this probability, times a multiplier that grows as the stream's last agreement falls.
        interval (`int`, `float` or a list of them, one per stream, *optional*): M in tokens, or as a share rho in
            [0, 1] given as `float`: `ceil(exp(rho * ln(interval_min) + (1 - rho) * ln(interval_max)))`. `None`:
            `block_size`.
        interval_min, interval_max (`int`): Tokens that rho = 1 and rho = 0 stand for.
        max_interval (`int`, *optional*): A block ends after so many tokens at the latest. `None`: `commit_horizon`.
        min_probability (`float`): Least probability per token.
        multiplier_min, multiplier_max (`float`): At an agreement of `agreement_high` or more, and of `agreement_low`
            or less; linear between. An older block gets `1 + age_boost * max(0, tokens / M - 1)` times as much, at
            most `multiplier_max`.
        agreement_low, agreement_high, age_boost (`float`): See there.
    """

    mode: str = "deterministic"
    interval: int | float | list | None = None
    interval_min: int = 8
    interval_max: int = 128
    max_interval: int | None = None
    min_probability: float = 1e-4
    multiplier_min: float = 0.5
    multiplier_max: float = 2.0
    agreement_low: float = 0.25
    agreement_high: float = 0.6
    age_boost: float = 0.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_choice(owner, "mode", self.mode, CADENCE_MODES)
        for value in self.interval if isinstance(self.interval, (list, tuple)) else [self.interval]:
            if isinstance(value, float):
                check_range(owner, "interval", value, 0, 1)
            elif value is not None:
                check_integer(owner, "interval", value, 1)
        check_integer(owner, "interval_min", self.interval_min, 1)
        check_integer(owner, "interval_max", self.interval_max, self.interval_min)
        if self.max_interval is not None:
            check_integer(owner, "max_interval", self.max_interval, 1)
        check_range(owner, "min_probability", self.min_probability, 0, 1)
        check_range(owner, "multiplier_min", self.multiplier_min, 0)
        check_range(owner, "multiplier_max", self.multiplier_max, self.multiplier_min)
        check_range(owner, "agreement_low", self.agreement_low, 0, 1)
        if not self.agreement_low < self.agreement_high <= 1:
            raise ValueError(
                f"{owner}.agreement_high must be in (agreement_low, 1] = ({self.agreement_low}, 1], "
                f"got {self.agreement_high}."
            )
        check_range(owner, "age_boost", self.age_boost, 0)


@dataclass(frozen=True)
class GateAnnealing:
    """
    How a row's gate scale follows its blocks. A block is volatile when it is withdrawn or its agreement is below
    `agreement_threshold + stability_margin`.

    Args:
        decay (`float`): Factor after a volatile block.
        min_value (`float`): Least gate scale.
        cooldown (`int`): Stable blocks after a volatile one before the gate recovers.
        recovery (`float`): What a stable block adds then, up to `gate_scale`.
        stability_margin (`float`): See above.
    """

    decay: float = 0.6
    min_value: float = 0.1
    cooldown: int = 1
    recovery: float = 0.05
    stability_margin: float = 0.05

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_range(owner, "decay", self.decay, 0, 1)
        check_range(owner, "min_value", self.min_value, 0, 10)
        check_integer(owner, "cooldown", self.cooldown, 0)
        check_range(owner, "recovery", self.recovery, 0, 10)
        check_range(owner, "stability_margin", self.stability_margin, 0, 1)


@dataclass(frozen=True)
class FlickerGuard:
    """
    Watches a row over its last blocks: its gate scale, and the plan item that its text covers best.

    Args:
        window (`int`): Blocks that count; nothing is said before there are so many.
        max_std (`float`): Standard deviation of the gate scale above which the row flickers.
        max_switches (`int`, *optional*): Changes of the best covered item, from one block to the next, above which it
            does; at most `window - 2`. `None`: items do not count.
        clamp (`float`, *optional*): The gate scale of a row that flickers, as long as it does. `None`: only told.
    """

    window: int = 8
    max_std: float = 0.2
    max_switches: int | None = None
    clamp: float | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_integer(owner, "window", self.window, 2)
        check_range(owner, "max_std", self.max_std, 0)
        if self.max_switches is not None:
            check_integer(owner, "max_switches", self.max_switches, 0)
            check_range(owner, "max_switches", self.max_switches, 0, self.window - 2)
        if self.clamp is not None:
            check_range(owner, "clamp", self.clamp, 0, 10)


@dataclass(frozen=True)
class SensitivityProbe:
    """
    Measures how much the logits move when the notes do.

    Args:
        every (`int`): Exchanges of notes from one measurement to the next; the first one that rows read is measured.
        epsilon (`float`): Norm of the noise, relative to the norm of the notes that a row sees.
        max_ratio (`float`): Relative change of the logits per relative change of the notes above which the trace says
            so.
    """

    every: int = 8
    epsilon: float = 1e-3
    max_ratio: float = 5.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_integer(owner, "every", self.every, 1)
        check_range(owner, "epsilon", self.epsilon, 1e-6, 1)
        check_range(owner, "max_ratio", self.max_ratio, 0)


def make_policy(kind: type, name: str, value: Any) -> Any:
    """
    A group of options from its mapping; `None` stays `None`.

    Raises:
        ValueError: For anything else, an unknown option or an impossible number.
    """
    if value is None:
        return None
    known = [field.name for field in fields(kind)]
    if not isinstance(value, dict) or set(value) - set(known):
        raise ValueError(f"{name} must be a mapping of {known}, got {value!r}.")
    return kind(**value)
