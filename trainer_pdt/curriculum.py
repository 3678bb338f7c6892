"""Stages of training: who learns, from which losses, with how much noise, until which step. Standard library only.

A stage never changes what has a gradient by toggling parameters; it says by how much each parameter group's learning
rate is multiplied (`multiplier`, 0 = frozen), and callers mask the gradients of groups whose multiplier is 0.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

PARAMETER_GROUPS: dict[str, str] = {
    "snc": "Shared-notes cross-attention with its gates and sinks; the note norm that all producers share.",
    "stream_adapters": "Bottleneck adapters by stream id.",
    "writer": "Speculation head: writes a stream's notes from its own block.",
    "encoder": "Notes encoder: makes notes and plan items from text.",
    "planner": "Planner head and plan embedding.",
    "coverage": "Coverage head.",
    "agreement": "Agreement head.",
    "stream": "Classifier of the stream that wrote a state.",
}
"""Groups of trainable parameters that a stage may train, with what belongs to them."""

VALUES, OWNERS_OF_VALUES = "values", ("snc", "writer")
"""The part of two groups that carries what notes say: the writer's output, SNC's values and outputs."""

WRITING_GROUPS: tuple[str, ...] = ("snc", "stream_adapters", "writer", "encoder")
"""Groups that decide what a stream writes; the others only judge it, or tell plans apart."""

LOSS_NAMES: tuple[str, ...] = (
    "planner",
    "kd_plan",
    "plan_snapshot",
    "lm_ce",
    "kd",
    "keep_close",
    "block_start",
    "notes",
    "spec",
    "spec_kl",
    "use",
    "stab",
    "red",
    "cov",
    "stream",
    "agree",
)
"""Losses that a stage may weigh."""

METRIC_NAMES: tuple[str, ...] = ("nli",)
"""Measures without a gradient; they take no weight."""

DataView = Literal["clean", "corrupted", "own"]
AgreementLabelKind = Literal["planted", "readiness", "auto"]

_PROBABILITIES = (
    *("bus_mix", "note_drop", "note_swap", "stream_dropout", "lag_jitter", "item_drop"),
    *("note_paraphrase", "note_contradict", "item_contradict"),
)
_ONLY_SOURCES = {"coverage": ("cov", "agree"), "agreement": ("agree",), "stream": ("stream",)}


def check_range(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """
    Raise a `ValueError` that names field, value and range unless `value` is a finite number in `low..high`.

    Args:
        name (`str`): Field.
        value (`Any`): What was given.
        low (`float`): Smallest allowed value.
        high (`float`, *optional*): Largest allowed value.
        above (`bool`, *optional*, defaults to `False`): `low` itself is not allowed.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and value <= high and (value > low if above else value >= low):
        return
    lower = f"above {low}" if above else f"at least {low}"
    upper = "" if high == math.inf else f" and at most {high}"
    raise ValueError(f"{name}={value!r}, allowed: a number {lower}{upper}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """
    Raise a `ValueError` that names field, value, the nearest choice and all choices unless `value` is one of them.

    Args:
        name (`str`): Field.
        value (`Any`): What was given.
        choices (`Iterable[str]`): Allowed values.
    """
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{name}: {value!r} is unknown{hint}, allowed: {', '.join(choices)}.")


@dataclass(frozen=True)
class Stage:
    """
    One stage of the curriculum. Probabilities are per draw and lie in 0..1.

    Args:
        name (`str`): Unique name.
        until (`int`): Optimizer step before which the stage ends.
        train (`tuple[str]`): Groups of `PARAMETER_GROUPS` that learn; all others are frozen.
        losses (`dict[str, float]`): Weights, at least 0, by name of `LOSS_NAMES`.
        bus_mix (`float`, *optional*, defaults to 0.0): Probability that a block's note on the student's bus is the
            teacher's; 0 = all notes are self-written, as in decoding.
        note_drop (`float`, *optional*, defaults to 0.0): Probability that a block's notes never arrive.
        note_swap (`float`, *optional*, defaults to 0.0): Probability that a document reads another document's notes.
        note_noise (`float`, *optional*, defaults to 0.0): Standard deviation of Gaussian noise on notes (RMS 1).
        stream_dropout (`float`, *optional*, defaults to 0.0): Probability that all notes of a producer are hidden.
        lag_jitter (`float`, *optional*, defaults to 0.0): Probability that a row reads with lag 0, as in a rewrite.
        item_drop (`float`, *optional*, defaults to 0.0): Probability that a token of a plan item's text is hidden, so
            that items are recognised in other words too.
        lr_scale (`dict[str, float]`, *optional*): Learning-rate factor above 0 of trained groups; 1 when missing.
            `values`, the part of `snc` and `writer` that carries what notes say, may have one more on top of its
            group's; there 0 leaves it as it is.
        data (`str`, *optional*, defaults to `"clean"`): `"corrupted"` = rows with planted contradictions; `"own"` =
            rows that the model itself has written, judged by the parser of the procedural worlds; only in a stage
            that trains none of `WRITING_GROUPS`.
        note_paraphrase (`float`, *optional*, defaults to 0.0): Probability that a teacher's note on the student's bus
            is told in other words; with `bus_mix` above 0.
        note_contradict (`float`, *optional*, defaults to 0.0): Probability that it tells other values than the text;
            with `bus_mix` above 0.
        item_contradict (`float`, *optional*, defaults to 0.0): Probability that another document's item stands in the
            place of a plan item, as a negative of `cov`.
        agreement_labels (`str`, *optional*, defaults to `"planted"`): What `agree` refuses: contradictions;
            `"readiness"` = also blocks with a reference that the data calls not ready; `"auto"` = also blocks that
            fresher notes would have helped (`agreement_margin`).
    """

    name: str
    until: int
    train: tuple[str, ...]
    losses: dict[str, float]
    bus_mix: float = 0.0
    note_drop: float = 0.0
    note_swap: float = 0.0
    note_noise: float = 0.0
    stream_dropout: float = 0.0
    lag_jitter: float = 0.0
    item_drop: float = 0.0
    lr_scale: dict[str, float] = field(default_factory=dict)
    data: DataView = "clean"
    note_paraphrase: float = 0.0
    note_contradict: float = 0.0
    item_contradict: float = 0.0
    agreement_labels: AgreementLabelKind = "planted"

    def __post_init__(self) -> None:
        where = f"stages[{self.name}]"
        for name in _PROBABILITIES:
            check_range(f"{where}.{name}", getattr(self, name), 0.0, 1.0)
        check_range(f"{where}.note_noise", self.note_noise, 0.0)
        check_choice(f"{where}.data", self.data, get_args(DataView))
        check_choice(f"{where}.agreement_labels", self.agreement_labels, get_args(AgreementLabelKind))
        self._check_groups(where)
        self._check_losses(where)
        self._check_effects(where)

    def _check_groups(self, where: str) -> None:
        if not self.train:
            raise ValueError(f"{where}.train is empty, allowed: one or more of {', '.join(PARAMETER_GROUPS)}.")
        for group in self.train:
            check_choice(f"{where}.train", group, PARAMETER_GROUPS)
            if self.data == "own" and group in WRITING_GROUPS:
                judges = [name for name in PARAMETER_GROUPS if name not in WRITING_GROUPS]
                raise ValueError(
                    f"{where}.train: {group!r} changes what is written, allowed with data='own': {', '.join(judges)}."
                )
        if len(set(self.train)) != len(self.train):
            raise ValueError(f"{where}.train={list(self.train)} repeats a group, allowed: each at most once.")
        has_values = any(group in self.train for group in OWNERS_OF_VALUES)
        for group, scale in self.lr_scale.items():
            check_choice(f"{where}.lr_scale", group, (*self.train, VALUES) if has_values else self.train)
            check_range(f"{where}.lr_scale.{group}", scale, 0.0, above=group != VALUES)

    def _check_losses(self, where: str) -> None:
        for loss, weight in self.losses.items():
            check_choice(f"{where}.losses", loss, LOSS_NAMES)
            check_range(f"{where}.losses.{loss}", weight, 0.0)
        if not self.active_losses:
            raise ValueError(f"{where}.losses={self.losses} has no weight above 0, allowed: at least one.")
        for group in self.train:
            sources = _ONLY_SOURCES.get(group, self.active_losses)
            if not any(self.is_active(loss) for loss in sources):
                raise ValueError(
                    f"{where}.train: {group!r} learns from none of the losses {list(self.active_losses)}, "
                    f"allowed: together with {' or '.join(sources)}."
                )

    def _check_effects(self, where: str) -> None:
        """What would do nothing is refused."""
        acts = {
            "note_paraphrase": (self.note_paraphrase == 0 or self.bus_mix > 0, "bus_mix above 0"),
            "note_contradict": (self.note_contradict == 0 or self.bus_mix > 0, "bus_mix above 0"),
            "item_contradict": (self.item_contradict == 0 or self.is_active("cov"), "a weight of cov"),
            "agreement_labels": (self.agreement_labels == "planted" or self.is_active("agree"), "a weight of agree"),
        }
        for name, (does, needs) in acts.items():
            if not does:
                raise ValueError(f"{where}.{name}={getattr(self, name)!r} does nothing, allowed: with {needs}.")

    @property
    def needs_variants(self) -> bool:
        """Whether batches have to hold other renderings of notes and plan, and the data's labels."""
        contradicts = self.note_contradict > 0 or self.item_contradict > 0
        return contradicts or self.note_paraphrase > 0 or self.agreement_labels == "readiness"

    @property
    def active_losses(self) -> tuple[str, ...]:
        """Names of the losses whose weight is above 0."""
        return tuple(loss for loss, weight in self.losses.items() if weight > 0)

    def is_active(self, loss: str) -> bool:
        """Whether `loss` has a weight above 0, so that its forward passes are worth running."""
        check_choice("loss", loss, LOSS_NAMES)
        return self.losses.get(loss, 0.0) > 0

    def multiplier(self, group: str, of_values: bool = False) -> float:
        """Factor of the learning rate of `group`, or of its part `values`; 0 = frozen."""
        check_choice("group", group, PARAMETER_GROUPS)
        if group not in self.train:
            return 0.0
        return float(self.lr_scale.get(group, 1.0)) * float(self.lr_scale.get(VALUES, 1.0) if of_values else 1.0)


@dataclass(frozen=True)
class Curriculum:
    """
    Stages in order; together they cover every optimizer step of the run exactly once.

    Args:
        stages (`tuple[Stage]`): At least one; `until` increases and the last one's is the end of training.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty, allowed: at least one stage.")
        start = 0
        names: set[str] = set()
        for stage in self.stages:
            if stage.name in names:
                raise ValueError(f"stages: the name {stage.name!r} is used twice, allowed: unique names.")
            if stage.until <= start:
                raise ValueError(f"stages[{stage.name}].until={stage.until}, allowed: a step above {start}.")
            names.add(stage.name)
            start = stage.until

    @classmethod
    def from_list(cls, stages: Sequence[Mapping[str, Any]], max_steps: int) -> "Curriculum":
        """
        Build and check the curriculum of a recipe.

        Args:
            stages (`Sequence[Mapping[str, Any]]`): Mappings with the fields of `Stage`. `until` is an optimizer step
                (`int`) or a share of `max_steps` (`float` in 0..1, 0 excluded); the last one has to reach `max_steps`.
            max_steps (`int`): Optimizer steps of the run.
        """
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
            raise ValueError(f"max_steps={max_steps!r}, allowed: an int of at least 1.")
        if isinstance(stages, str | Mapping) or not isinstance(stages, Sequence):
            raise ValueError(f"stages={stages!r}, allowed: a list of mappings.")
        curriculum = cls(tuple(_stage_from_mapping(index, entry, max_steps) for index, entry in enumerate(stages)))
        last = curriculum.stages[-1]
        if last.until != max_steps:
            raise ValueError(f"stages[{last.name}].until={last.until}, allowed for the last: {max_steps} or 1.0.")
        return curriculum

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole curriculum."""
        return self.stages[-1].until

    @property
    def starts(self) -> tuple[int, ...]:
        """First step of each stage."""
        return (0, *(stage.until for stage in self.stages[:-1]))

    def index_at(self, step: int) -> int:
        """
        Index of the stage in force at `step` finished optimizer steps; at the end of training, the last stage.

        Args:
            step (`int`): 0 to `max_steps`.
        """
        check_range("step", step, 0, self.max_steps)
        return next((index for index, stage in enumerate(self.stages) if step < stage.until), len(self.stages) - 1)

    def stage_at(self, step: int) -> Stage:
        """The stage in force at `step`; see `index_at`."""
        return self.stages[self.index_at(step)]

    def multiplier(self, step: int, group: str, of_values: bool = False) -> float:
        """[`Stage.multiplier`] of the stage at `step`."""
        return self.stage_at(step).multiplier(group, of_values)

    def history(self) -> list[dict[str, Any]]:
        """Records of all stages for telemetry: place, steps, who learns and who is frozen, and all settings."""
        records = []
        for index, (start, stage) in enumerate(zip(self.starts, self.stages, strict=True)):
            settings = asdict(stage)
            name, until, train = settings.pop("name"), settings.pop("until"), list(settings.pop("train"))
            frozen = [group for group in PARAMETER_GROUPS if group not in train]
            place = {"index": index, "name": name, "start": start, "until": until, "steps": until - start}
            records.append({**place, "train": train, "frozen": frozen, **settings})
        return records


def _stage_from_mapping(index: int, entry: Mapping[str, Any], max_steps: int) -> Stage:
    if not isinstance(entry, Mapping):
        raise ValueError(f"stages[{index}]={entry!r}, allowed: a mapping with the fields of a stage.")
    known = [item.name for item in fields(Stage)]
    for key in entry:
        check_choice(f"stages[{index}]", key, known)
    missing = [key for key in ("name", "until", "train", "losses") if key not in entry]
    if missing:
        raise ValueError(f"stages[{index}] lacks {', '.join(missing)}, allowed: {', '.join(known)}.")
    if not isinstance(entry["name"], str) or not entry["name"]:
        raise ValueError(f"stages[{index}].name={entry['name']!r}, allowed: a name in letters.")
    where = f"stages[{entry['name']}]"
    values = dict(entry)
    values["until"] = _resolve_until(where, entry["until"], max_steps)
    values["train"] = _names(f"{where}.train", entry["train"])
    for key in ("losses", "lr_scale"):
        if key in entry:
            values[key] = _weights(f"{where}.{key}", entry[key])
    return Stage(**values)


def _resolve_until(where: str, until: Any, max_steps: int) -> int:
    if isinstance(until, float) and 0.0 < until <= 1.0:
        steps = round(until * max_steps)
        if steps < 1:
            raise ValueError(f"{where}.until={until} of max_steps={max_steps} is no step, allowed: at least one step.")
        return steps
    if isinstance(until, int) and not isinstance(until, bool) and 1 <= until <= max_steps:
        return until
    raise ValueError(f"{where}.until={until!r}, allowed: a step 1 to {max_steps} or a share above 0.0 to 1.0.")


def _names(where: str, names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"{where}={names!r}, allowed: a list of names.")
    return tuple(names)


def _weights(where: str, weights: Any) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where}={weights!r}, allowed: a mapping from name to number.")
    return dict(weights)
