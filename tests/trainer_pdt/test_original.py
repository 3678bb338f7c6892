"""Checkpoints of the original system: read safely, recognised, computed as the original did, reported in full."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_pdt import PDTForParallelDecoding
from recipes import convert_checkpoint
from tests.modeling_pdt.conftest import llama_trunk
from tests.trainer_pdt.original_model import FROZEN, GENERATIONS, SLOTS, A, B, D, H, Original, R, S, layer_state
from trainer_pdt.original.checkpoint import read_checkpoint
from trainer_pdt.original.heads import HeadChoices, OriginalHeads, original_plan_bucket

HEADS_FILE = "original_heads.safetensors"
TRAINING = {
    "global_step": 45000,
    "epoch": 2,
    "stage_index": 3,
    "stage_history": [{"name": "gate", "start_step": 25000}],
}


def write(path: Path, state, form: str = "bare") -> Path:
    """A checkpoint as the original wrote it."""
    if form == "safetensors":
        save_file(state, path := path.with_suffix(".safetensors"))
    elif form == "nested":
        training = {**TRAINING, "optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}, "scheduler_state": {}}
        torch.save({"adapters": state, "training_state": training}, path)
    else:
        torch.save(state, path)
    return path


def run(checkpoint: Path, folder: Path, **options) -> dict:
    """The recipe; its report."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return convert_checkpoint.main(["--checkpoint", str(checkpoint), "--output_folder", str(folder), *words])


def inputs(dtype=torch.float32):
    """States of two rows of 40 tokens, the second padded, and plan items, the last of them none."""
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 33:] = 0
    return torch.randn(2, 40, H, dtype=dtype), mask, torch.tensor([[1, 5, 9], [2, 3, 0]])


def by_part(report):
    return {part["part"]: part for part in report["parts"]}


@pytest.mark.parametrize("name", GENERATIONS)
def test_heads_compute_what_the_original_computed(tmp_path, name):
    original = Original(**GENERATIONS[name]).eval()
    report = run(write(tmp_path / "adapters.pt", original.state_dict()), tmp_path / "out")
    heads = OriginalHeads.from_pretrained(tmp_path / "out")
    hidden, mask, plan = inputs()
    with torch.no_grad():
        expected, found = original(hidden, mask, plan, plan != 0), heads(hidden, mask, plan)
        for key, tensor in expected.items():
            assert found[key].shape == tensor.shape, key
            assert (found[key] - tensor).abs().max() <= 1e-6, key
        assert found.coverage_logits[1, 2] == 0 and found.coverage_logits[1, 1] != 0
        if "plan_notes_proj" in heads.forms:
            assert torch.allclose(heads.plan_note(plan[:1]), original.plan_note(plan[:1]), atol=1e-6)
        else:
            with pytest.raises(ValueError, match="no plan_notes_proj"):
                heads.plan_note(plan)
    expected_traits = (
        [name] if name != "head" else [trait for trait in GENERATIONS if trait not in ("release", "head")]
    )
    assert set(expected_traits) <= set(report["generation"])
    assert (report["generation"] == ["release"]) == (name == "release")


def test_bfloat16_is_computed_to_the_bit(tmp_path):
    original = Original().eval().bfloat16()
    run(write(tmp_path / "adapters.pt", original.state_dict()), tmp_path / "out")
    hidden, mask, plan = inputs(torch.bfloat16)
    with torch.no_grad():
        found = OriginalHeads.from_pretrained(tmp_path / "out")(hidden, mask, plan)
        expected = original(hidden, mask, plan, plan != 0)
    for key in ("planner_logits", "notes", "speculative_notes", "agreement", "stream_logits"):
        assert found[key].dtype == torch.bfloat16 and torch.equal(found[key], expected[key]), key


def test_forms_of_the_file_are_one(tmp_path):
    state = Original().state_dict()
    reports = {}
    for form in ("bare", "nested", "safetensors"):
        reports[form] = run(write(tmp_path / f"{form}.pt", state, form), tmp_path / form)
        assert reports[form]["source"]["form"] == form
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    reports["ddp"] = run(write(tmp_path / "ddp.pt", prefixed), tmp_path / "ddp")
    for form, report in reports.items():
        assert report["parts"] == reports["bare"]["parts"], form
        kept = load_file(tmp_path / form / HEADS_FILE)
        assert len(state) == 50 and set(kept) == {n for n in state if not n.startswith(("stream_ad", "cross_"))}
        assert all(torch.equal(tensor, state[name]) for name, tensor in kept.items()), form
    assert len(reports["ddp"]["renamed"]) == 50 and not reports["bare"]["renamed"]
    assert reports["nested"]["training"] == TRAINING and reports["bare"]["training"] == {}
    assert reports["nested"]["left_out"] == ["optimizer_state", "scheduler_state"]


def test_names_from_before_the_renaming(tmp_path):
    state = {name.replace("stream_", "role_"): tensor for name, tensor in Original().state_dict().items()}
    report = run(write(tmp_path / "roles.pt", state), tmp_path / "out")
    assert report["renamed"]["role_classifier.proj.bias"] == "stream_classifier.proj.bias"
    assert report["streams"] == ["stream_0", "stream_1", "stream_2"] and report["generation"] == ["release"]


@pytest.mark.parametrize("stage", FROZEN)
def test_stages_lack_what_they_had_frozen(tmp_path, stage):
    state = {n: t for n, t in Original().state_dict().items() if n.split(".")[0] not in FROZEN[stage]}
    parts = by_part(run(write(tmp_path / "adapters.pt", state), tmp_path / "out"))
    missing = {name for name, part in parts.items() if part["use"] == "missing"}
    assert missing == {*FROZEN[stage], "plan_notes_proj", "notes_summary_query", "layers"}
    assert all(parts[name]["trained"] == "no" and parts[name]["parameters"] == 0 for name in missing)
    hidden, mask, plan = inputs()
    found = OriginalHeads.from_pretrained(tmp_path / "out")(hidden, mask, plan)
    assert (found.speculative_notes is None) == (stage < 2) and (found.coverage_logits is None) == (stage < 3)


def test_the_report_says_what_becomes_of_every_tensor(tmp_path, capsys):
    original = Original(plan_note=True)
    state = {**original.state_dict(), **layer_state()}
    report = run(write(tmp_path / "adapters.pt", state, "nested"), tmp_path / "out")
    parts = by_part(report)
    assert sum(part["tensors"] for part in parts.values()) == len(state)
    assert sum(part["parameters"] for part in parts.values()) == sum(t.numel() for t in state.values())
    trained = {name for name, part in parts.items() if part["trained"] == "yes"}
    assert trained == {"planner_head", "notes_head", "speculation_head", "coverage_head", "plan_embedding"}
    assert parts["stream_adapters"]["trained"] == parts["cross_attention"]["trained"] == "no"
    assert {name for name, part in parts.items() if part["use"] == "left out"} == {
        *("stream_adapters", "cross_attention", "layers")
    }
    assert (
        parts["agreement_head"]["trained"] == "unknown" and parts["notes_summary_query"]["use"] == "kept, not computed"
    )
    assert report["layers"] == [2, 3] and report["adapter_sizes"]["instrumented_layers"] == [2, 3]
    assert report["sizes"] == {"H": H, "D": D, "R": R, "B": B, "S": S, "A": A, "G": 1}
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == report
    text = (tmp_path / "out" / "conversion.md").read_text()
    assert text in capsys.readouterr().out
    assert all(f"| {name} | {part['parameters']:,} |" in text for name, part in parts.items())
    assert report["source"]["sha256"] in text and "global_step: 45000" in text and "optimizer_state" in text


def test_agreement_of_the_release_is_not_trained(tmp_path):
    parts = by_part(run(write(tmp_path / "adapters.pt", Original().state_dict()), tmp_path / "out"))
    assert parts["agreement_head"]["trained"] == "no" and parts["stream_classifier"]["trained"] == "no"


def test_a_model_of_the_same_sizes_is_untrained_and_loads(tmp_path):
    llama_trunk(hidden_size=H, intermediate_size=16).save_pretrained(tmp_path / "trunk")
    settings = GENERATIONS["head"]
    checkpoint = write(tmp_path / "adapters.pt", Original(**settings).state_dict())
    report = run(checkpoint, tmp_path / "out", trunk=tmp_path / "trunk")
    model = PDTForParallelDecoding.from_pretrained(tmp_path / "out")
    sizes = {"num_streams": S, "notes_dim": D, "adapter_bottleneck": A, "plan_vocab_size": B, "num_plan_slots": SLOTS}
    assert report["adapter_sizes"] == sizes | {"adapter_activation": "gelu", "snc_heads": 2, "gate_mode": "per_head"}
    assert all(getattr(model.config, name) == value for name, value in report["adapter_sizes"].items())
    assert model.config.trained_parts == [] and report["model"]["trained"] == []
    assert "nothing in it is trained" in (tmp_path / "out" / "conversion.md").read_text()
    model.check_conditioning()
    with pytest.raises(ValueError, match="has width 32, allowed: the checkpoint's, 16"):
        llama_trunk().save_pretrained(tmp_path / "wide")
        run(checkpoint, tmp_path / "other", trunk=tmp_path / "wide")
    assert not (tmp_path / "other").exists()


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def spoiled(change):
    state = Original().state_dict()
    change(state)
    return state


BIAS = "notes_head.projector.bias"
REFUSED = {
    "other tensors": (lambda s: s.update({"lm_head.weight": torch.ones(2, 2)}), r"no generation .* lm_head\.weight"),
    "incomplete": (lambda s: s.pop(BIAS), rf"notes_head is incomplete: {BIAS} missing"),
    "shape": (lambda s: s.update({BIAS: torch.zeros(7)}), rf"{BIAS} has shape \[7\], expected \['D'\]; D = {D}"),
    "two forms": (
        lambda s: s.update({"coverage_head.score.bias": torch.zeros(1)}),
        "coverage_head has tensors of two",
    ),
    "nan": (lambda s: s[BIAS].fill_(float("nan")), rf"{BIAS} has values that are not finite"),
    "integers": (lambda s: s.update({BIAS: torch.ones(D, dtype=torch.long)}), rf"{BIAS} is .*int64"),
    "sparse": (lambda s: s.update({BIAS: torch.ones(D).to_sparse()}), rf"{BIAS} is torch\.sparse_coo"),
    "repeated": (lambda s: s.update({BIAS: torch.ones(1).expand(10**12)}), rf"{BIAS} says shape .* smaller storage"),
    "no tensor": (lambda s: s.update({BIAS: [1.0]}), rf"'{BIAS}' is a list"),
    "twice": (lambda s: s.update({f"module.{BIAS}": s[BIAS]}), "holds a tensor twice"),
    "nothing": (lambda s: s.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind):
    change, match = REFUSED[kind]
    path = write(tmp_path / "adapters.pt", spoiled(change))
    with pytest.raises(ValueError, match=match):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_checkpoint_runs(tmp_path):
    trace = tmp_path / "trace"
    for name, content in {
        "bare.pt": {"plan_embedding.weight": Bomb(trace)},
        "nested.pth": {"adapters": Original().state_dict(), "training_state": {"stage_history": Bomb(trace)}},
    }.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not read: it holds more than tensors"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"weight": Bomb(trace)}))
    with pytest.raises(ValueError, match=r"plain\.bin is"):
        read_checkpoint(tmp_path / "plain.bin")
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 broken"])
def test_damaged_files(tmp_path, suffix, content):
    (tmp_path / f"file{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"file{suffix} is"):
        read_checkpoint(tmp_path / f"file{suffix}")


def test_other_files(tmp_path):
    for path in (tmp_path / "adapters.json", tmp_path / "none.pt"):
        with pytest.raises(ValueError, match=r"checkpoint=.* allowed: a file that ends in \.pt"):
            read_checkpoint(path)
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    torch.save({"adapters": Original().state_dict(), "model": {}}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"has entries \['model'\] beside its tensors"):
        read_checkpoint(tmp_path / "more.pt")
    torch.save({"adapters": {}, "training_state": {"epoch": torch.ones(2)}}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"training_state\.epoch is no plain value"):
        read_checkpoint(tmp_path / "state.pt")


def test_a_folder_with_something_else_is_not_written_to(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="allowed: a new or an empty folder"):
        run(write(tmp_path / "adapters.pt", Original().state_dict()), tmp_path)


def test_what_shapes_do_not_tell_has_to_be_said(tmp_path):
    state = Original(slots=True).state_dict()
    del state["plan_embedding.weight"]
    path = write(tmp_path / "adapters.pt", state)
    with pytest.raises(ValueError, match="planner_slots is missing"):
        run(path, tmp_path / "out")
    assert run(path, tmp_path / "out", planner_slots=16)["choices"]["planner_slots"] == 16
    assert OriginalHeads.from_pretrained(tmp_path / "out")(inputs()[0]).planner_logits.shape == (2, 16, B)
    for field, value in {"planner_slots": 7, "coverage_heads": 5, "coverage_window": -1}.items():
        with pytest.raises(ValueError, match=f"{field}={value}, allowed"):
            OriginalHeads(Original(multi_head=True).state_dict(), HeadChoices(**{field: value}))


def test_choices_change_what_is_computed():
    state, (hidden, mask, plan) = Original(multi_head=True).state_dict(), inputs()
    usual = OriginalHeads(state)(hidden, mask, plan)
    scaled = OriginalHeads(state, HeadChoices(teacher_scale=2.0, coverage_window=0))(hidden, mask, plan)
    assert torch.equal(scaled.speculative_notes, 2 * usual.speculative_notes)
    assert not torch.allclose(scaled.coverage_logits, usual.coverage_logits)
    other = OriginalHeads(state, HeadChoices(coverage_heads=4)).to(torch.float64)(hidden.double(), mask, plan)
    assert other.coverage_logits.dtype == torch.float64
    assert not torch.allclose(other.coverage_logits.float(), usual.coverage_logits)


def test_buckets_of_plan_items():
    # SHA-256 of "parallel-decoder-v1::founding year" ends in these two bytes.
    assert original_plan_bucket(" Founding Year ", 65536) == original_plan_bucket("founding year", 65536) == 0xFCFB
    assert original_plan_bucket("  ", 65536) == 0
    assert {original_plan_bucket(str(number), 2) for number in range(20)} == {1}
