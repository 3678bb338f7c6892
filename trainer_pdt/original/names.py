"""Names and shapes of tensors in checkpoints of the original system, and the generation of its code that wrote them.

A dimension is a word: `H` width of the trunk, `D` of a note, `R` rows of the planner, `B` plan buckets, `S` streams,
`A` inner width of an adapter, `G` gates of an attention. One word stands for one number throughout a checkpoint.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class Form:
    """
    One form of one head.

    Args:
        part (`str`): Name of the head, the first part of its tensors' names.
        name (`str`): Of this form.
        tensors (`Mapping[str, tuple]`): Shape by full name.
        optional (`frozenset[str]`): Names that may be absent.
    """

    part: str
    name: str
    tensors: Mapping[str, Shape]
    optional: frozenset[str] = frozenset()


def _linear(name: str, rows: str | int, columns: str = "H") -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _square(part: str, *names: str) -> dict[str, Shape]:
    return {key: shape for name in names for key, shape in _linear(f"{part}.{name}", "H").items()}


FORMS = (
    Form("planner_head", "linear", {"planner_head.projector.weight": ("R", "H")}),
    Form(
        "notes_head",
        "gated",
        _linear("notes_head.projector", "D") | {"notes_head.gate": (1,)},
        frozenset({"notes_head.gate"}),
    ),
    Form("speculation_head", "linear", _linear("speculation_head.projector", "D")),
    Form("agreement_head", "single_state", _linear("agreement_head.scorer", 1)),
    Form(
        "coverage_head",
        "single_head",
        _square("coverage_head", "query", "key", "value", "proj.0") | _linear("coverage_head.proj.2", 1),
    ),
    Form(
        "coverage_head",
        "multi_head",
        _square("coverage_head", "q_proj", "k_proj", "v_proj", "o_proj")
        | _linear("coverage_head.score", 1)
        | {"coverage_head.log_temperature": ()},
        frozenset({"coverage_head.log_temperature"}),
    ),
    Form(
        "stream_classifier",
        "mean_pooled",
        _square("stream_classifier", "proj") | _linear("stream_classifier.classifier", "S"),
    ),
    Form("plan_embedding", "table", {"plan_embedding.weight": ("B", "H")}),
    Form("plan_notes_proj", "linear", _linear("plan_notes_proj", "D"), frozenset({"plan_notes_proj.bias"})),
    Form("notes_summary_query", "vector", {"notes_summary_query": (1, "D")}),
)
HEADS = tuple(dict.fromkeys(form.part for form in FORMS))

_SPECTRAL = r"parametrizations\.weight\.original"
_WEIGHT = rf"(?:weight|{_SPECTRAL})"
_ADAPTER = rf"adapters\.(?P<stream>[^.]+)\.(?P<tensor>(?:down|up)\.(?:{_WEIGHT}|bias)|layer_norm\.(?:weight|bias))"
_SNC = rf"(?P<tensor>gate|(?:[qkvo]_proj|gate_dyn_proj)\.(?:{_WEIGHT}|bias)|gate_pool_norm\.(?:weight|bias))"
_LAYER = r"(?:[\w.]+\.)?layers\.(?P<layer>\d+)\."
# Parameters that the original put, or meant to put, into the trunk's layers.
CONDITIONING = {
    "stream_adapters": (rf"stream_adapters\.{_ADAPTER}",),
    "cross_attention": (rf"cross_attention\.{_SNC}",),
    "layers": (
        rf"{_LAYER}stream_adapter\.(?:adapters\.)?{_ADAPTER}",
        rf"{_LAYER}snc_residual\.cross_attention\.{_SNC}",
        rf"{_LAYER}(?P<tensor>stream_adapter_gate|notes_gate|speculation_tap\.projector\.(?:weight|bias))",
    ),
}
_CONDITIONING_SHAPES: dict[str, Shape] = {
    "down.weight": ("A", "H"),
    "down.bias": ("A",),
    "up.weight": ("H", "A"),
    "up.bias": ("H",),
    "layer_norm.weight": ("H",),
    "layer_norm.bias": ("H",),
    "gate": ("G",),
    "gate_dyn_proj.weight": ("G", "H"),
    "gate_dyn_proj.bias": ("G",),
    "gate_pool_norm.weight": ("H",),
    "gate_pool_norm.bias": ("H",),
    **_linear("q_proj", "H"),
    **_linear("o_proj", "H"),
    **_linear("k_proj", "H", "D"),
    **_linear("v_proj", "H", "D"),
    **_linear("speculation_tap.projector", "D"),
    "stream_adapter_gate": (),
    "notes_gate": (),
}


@dataclass
class Contents:
    """
    What a checkpoint holds.

    Args:
        names (`dict[str, list[str]]`): Tensors by part.
        forms (`dict[str, str]`): Form of each head that is there.
        sizes (`dict[str, int]`): Number by word of a dimension.
        streams (`list[str]`), layers (`list[int]`): That parameters of conditioning are named after, in order.
        generation (`list[str]`): What tells the code that wrote it from the others, `["release"]` for none of it.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    streams: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    generation: list[str] = field(default_factory=list)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name as the release writes it: without the prefix `module.` of DDP, `role_*` as `stream_*`."""
    role = re.compile(r"(?<![a-z])role_(?=adapter|classifier|\d)")
    return {name: role.sub("stream_", name.removeprefix("module.")) for name in names}


def recognise(state: Mapping[str, torch.Tensor]) -> Contents:
    """
    Sorts the tensors of a checkpoint by part and reads its sizes.

    Args:
        state (`Mapping[str, torch.Tensor]`): Under the names of [`plain_names`].

    Raises:
        ValueError: For tensors that no generation of the original writes, incomplete heads, or shapes that contradict
            each other.
    """
    contents, shapes, unknown = Contents(), {}, []
    for name in sorted(state):
        form = next((form for form in FORMS if name in form.tensors), None)
        if form is not None:
            part, shapes[name] = form.part, form.tensors[name]
            if contents.forms.setdefault(part, form.name) != form.name:
                raise ValueError(f"{part} has tensors of two forms, {contents.forms[part]} and {form.name}.")
        else:
            part = _conditioning(name, contents, shapes)
        if part is None:
            unknown.append(name)
        else:
            contents.names.setdefault(part, []).append(name)
    if unknown:
        raise ValueError(f"tensors that no generation of the original writes: {_shown(unknown)}.")
    for form in FORMS:
        missing = sorted(set(form.tensors) - form.optional - set(state))
        if contents.forms.get(form.part) == form.name and missing:
            raise ValueError(f"{form.part} is incomplete: {_shown(missing)} missing.")
    if not contents.names:
        raise ValueError("the checkpoint holds no tensors.")
    contents.sizes = _sizes(state, shapes)
    contents.generation = _generation(state, contents)
    return contents


def _conditioning(name: str, contents: Contents, shapes: dict[str, Shape]) -> str | None:
    """The part of a parameter that conditions the trunk; notes its stream, layer and shape."""
    for part, patterns in CONDITIONING.items():
        for pattern in patterns:
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            found = match.groupdict()
            shapes[name] = _CONDITIONING_SHAPES[re.sub(_SPECTRAL, "weight", match["tensor"])]
            if found.get("stream") is not None and found["stream"] not in contents.streams:
                contents.streams.append(found["stream"])
            if found.get("layer") is not None and int(found["layer"]) not in contents.layers:
                contents.layers = sorted([*contents.layers, int(found["layer"])])
            return part
    return None


def _sizes(state: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    sources: dict[str | int, str] = {}
    for name, shape in shapes.items():
        actual = tuple(state[name].shape)
        fits = len(actual) == len(shape)
        for word, number in zip(shape, actual, strict=False):
            expected = sizes.setdefault(word, number) if isinstance(word, str) else word
            sources.setdefault(word, name)
            fits = fits and expected == number
        if not fits:
            known = [f"{word} = {sizes[word]} in {sources[word]}" for word in shape if word in sizes]
            raise ValueError(f"{name} has shape {list(actual)}, expected {list(shape)}; {', '.join(known)}.")
    return sizes


def _generation(state: Mapping[str, torch.Tensor], contents: Contents) -> list[str]:
    """Traits by which the generations differ, in the order in which the original took them on."""
    conditioning = [name for part in CONDITIONING for name in contents.names.get(part, ())]
    adapters = [name for name in conditioning if ".down." in name]
    traits = {
        "per-head gate (upgrade 01)": contents.sizes.get("G", 1) > 1,
        "dynamic gate (upgrade 01)": any("gate_dyn_proj" in name for name in conditioning),
        "multi-head coverage (upgrade 03)": contents.forms.get("coverage_head") == "multi_head",
        "adapters without layer norm (upgrade 05)": bool(adapters)
        and not any("layer_norm" in name for name in conditioning),
        "plan projection (plan_notes_proj)": "plan_notes_proj" in contents.names,
        "note summary (notes_summary_query)": "notes_summary_query" in contents.names,
        "parameters inside layers": "layers" in contents.names,
        "spectral norm": any("parametrizations" in name for name in conditioning),
    }
    return [trait for trait, present in traits.items() if present]


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
