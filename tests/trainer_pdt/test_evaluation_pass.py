"""Teacher-forced measures: names, hand-made cases, zeros where nothing can differ, documents that do not count."""

import re
from pathlib import Path

import pytest
import torch

from tests.tiny_training import make_collator, make_features, make_model, make_trainer
from trainer_pdt.collator import NO_SOURCE, SOURCE_NEVER
from trainer_pdt.evaluation.bars import HEALTH
from trainer_pdt.evaluation_pass import BUS_MIXES, TeacherForcedMetrics, _derived, _facts, mix_suffix
from trainer_pdt.losses import IGNORE_INDEX

PLAIN = {
    *("sibling_ce", "sibling_accuracy", "sibling_value_accuracy"),
    *("sibling_ce_ablated", "sibling_accuracy_ablated", "sibling_value_accuracy_ablated"),
    *("other_ce", "other_ce_trunk", "other_kl_trunk", "loss", "n_sibling", "n_other"),
}
PER_MIX = {
    *("mask_ablation", "kd_ce_ratio", "rollback_kl", "repair_error_rate", "stability_kl", "stability_error_rate"),
}
DOCS = Path(__file__).parents[2] / "docs/metrics.md"
HEADS = {f"{head}_{kind}" for head in ("coverage", "agreement") for kind in ("precision", "recall", "f1")}


@pytest.fixture(scope="module")
def model():
    """Heads that flag about half of what they see; SNC as it starts, which lets notes through."""
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.pdt_parameters().items():
            if "coverage" in name or "agreement" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def batch(model):
    features = make_features(3, split="validation")
    return make_collator(model, with_corrupted=True)([features[index] for index in range(3)])


def measured(model, batches, mixes=BUS_MIXES):
    metrics = TeacherForcedMetrics(model, mixes)
    for inputs in batches:
        metrics.add(inputs)
    return metrics.compute(lambda sums: sums)


def test_nothing_is_added_without_mixes(model, batch):
    plain, full = measured(model, [batch], ()), measured(model, [batch])
    assert set(plain) == PLAIN
    assert {name: full[name] for name in PLAIN} == plain


def test_what_nothing_was_counted_for_is_left_out(model, batch):
    # Documents that repeat nothing had an accuracy and a cross-entropy of 0.
    plain = measured(model, [{**batch, "source_round": torch.full_like(batch["source_round"], NO_SOURCE)}], ())
    assert set(plain) == {name for name in PLAIN if not name.startswith("sibling")}
    assert plain["loss"] == plain["other_ce"] > 0 and plain["n_sibling"] == 0


def test_names_of_every_mix(model, batch):
    names = set(measured(model, [batch])) - PLAIN
    ends = [mix_suffix(mix) for mix in BUS_MIXES]
    assert ends == ["", "_mix_0.35", "_mix_1"]
    values = {f"{name}{at}" for name in ("sibling_ce", "sibling_value_accuracy") for at in ends[1:]}
    per_mix = {f"{name}{at}" for name in PER_MIX for at in ends}
    always = per_mix | values | {"agreement_accuracy", "redundancy"}
    assert always | {name for name in HEADS if "f1" not in name} <= names <= always | HEADS


def defined_names():
    """Names in the first column of the tables of docs/metrics.md; `_b` behind `x_a` is `x_b`, `*_b` any name."""
    names = set()
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        found = re.findall("`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else []
        names |= {found[0].rpartition("_")[0] + name if name.startswith("_") else name for name in found}
    return names


def test_every_measure_is_defined(model, batch):
    names = {name.partition("_mix_")[0] for name in measured(model, [batch])} | HEADS | {row[0] for row in HEALTH}
    published = {
        *("kd_ce_ratio", "mask_ablation", "stability_kl", "rollback_kl", "repair_error_rate"),
        *("coverage_precision", "coverage_recall", "coverage_f1", "agreement_precision"),
    }
    defined = defined_names()
    assert names >= published
    assert {name.removesuffix("_ablated") for name in names} <= defined and "*_ablated" in defined


def test_measures_agree_with_their_definitions(model, batch):
    result = measured(model, [batch])
    assert result["mask_ablation"] == pytest.approx(result["sibling_ce_ablated"] - result["sibling_ce"], abs=1e-6)
    at_one = result["sibling_ce_ablated"] - result["sibling_ce_mix_1"]
    assert result["mask_ablation_mix_1"] == pytest.approx(at_one, abs=1e-6)
    assert result["kd_ce_ratio_mix_1"] == 0 < result["kd_ce_ratio_mix_0.35"] < result["kd_ce_ratio"]
    for name in ("rollback_kl", "stability_kl"):
        assert result[name] > 0 and result[f"{name}_mix_1"] > 0
    for name in ("repair_error_rate", "stability_error_rate", "agreement_accuracy"):
        assert 0 <= result[name] <= 1


def test_everything_is_zero_when_notes_cannot_be_read(batch):
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.pdt_parameters().items():
            if "pdt_snc" in name and parameter.dim() > 1:
                parameter.zero_()
    result = measured(model.eval(), [batch])
    for name in PER_MIX:
        for mix in BUS_MIXES:
            assert result[name + mix_suffix(mix)] == pytest.approx(0, abs=1e-6), name


def test_coverage_counts_at_the_threshold(model, batch, monkeypatch):
    wanted, counted = batch["coverage_targets"], batch["coverage_mask"]
    monkeypatch.setattr(model.generation_config, "coverage_threshold", 0.0)
    result = measured(model, [batch])
    share = float(wanted[counted].double().mean())
    assert (result["coverage_recall"], result["coverage_precision"]) == (1, pytest.approx(share))
    assert result["coverage_f1"] == pytest.approx(2 * share / (1 + share))
    monkeypatch.setattr(model.generation_config, "coverage_threshold", 1.0)
    result = measured(model, [batch])
    assert "coverage_precision" not in result and "coverage_f1" not in result and result["coverage_recall"] == 0


def test_agreement_finds_planted_contradictions(model, batch, monkeypatch):
    view = batch["corrupted"]
    share = float(view["contradicts"][view["judgeable"]].double().mean())
    assert 0 < share < 1
    monkeypatch.setattr(model.generation_config, "agreement_threshold", 1.0)
    result = measured(model, [batch])
    assert result["agreement_recall"] == 1
    assert result["agreement_precision"] == result["agreement_accuracy"] == pytest.approx(share)
    monkeypatch.setattr(model.generation_config, "agreement_threshold", 0.0)
    result = measured(model, [batch])
    assert result["agreement_accuracy"] == pytest.approx(1 - share) and "agreement_precision" not in result
    # All agreements are scaled to nearly 0: every block is below any threshold.
    monkeypatch.setattr(model.generation_config, "agreement_threshold", 0.01)
    monkeypatch.setattr(model.generation_config, "agreement_scaling", [1.0, -100.0])
    assert measured(model, [batch])["agreement_recall"] == 1


def test_notes_gap_of_a_writer_at_the_top(batch):
    """Notes that have read nothing of each other have no gap; else it is there, and only with mixes."""
    model = make_model(writer_tap="top", gate_init=2.0).eval()
    result = measured(model, [batch], (0.0,))
    assert 0 < result["notes_gap"] < 2 and "notes_gap" in defined_names()
    assert set(measured(model, [batch], ())) == PLAIN
    with torch.no_grad():
        for site in model.stack.snc:
            site.o_proj.weight.zero_()
    assert measured(model, [batch], (0.0,))["notes_gap"] == pytest.approx(0, abs=1e-5)


def test_redundancy_is_that_of_siblings_of_one_round(model, batch):
    notes = []
    handle = model.register_forward_hook(lambda module, args, out: notes.append(out.speculation))
    result = measured(model, [batch], (0.0,))
    handle.remove()
    mean, exists, values = notes[0].mean(dim=2), batch["block_exists"], []
    for document in range(3):
        for one, other in ((0, 1), (0, 2), (1, 2)):
            rows = 3 * document + one, 3 * document + other
            cosine = torch.cosine_similarity(mean[rows[0]], mean[rows[1]], dim=-1)
            values += torch.relu(cosine - 0.7)[exists[rows[0]] & exists[rows[1]]].tolist()
    assert result["redundancy"] == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_facts_that_owners_repeat_are_told_apart():
    ours = torch.tensor([[0, 0, 1, -1, -1], [-1, 1, 1, -1, -1]])
    told = torch.tensor([[2, 2, SOURCE_NEVER, 1, 3], [NO_SOURCE, 2, 2, 3, 3]])
    ours, told = (torch.nn.functional.pad(values, (1, 0), value=-1) for values in (ours, told))
    groups = _facts({"reference": ours, "source_round": told, "labels": torch.ones_like(ours)}).tolist()
    same = {frozenset(place for place in range(10) if groups[place] == group) for group in groups}
    assert same == {frozenset(places) for places in ([0, 1], [2], [3], [4], [5], [6, 7], [8, 9])}


def test_batches_add_up(model):
    features, collator = make_features(2, split="validation"), make_collator(model, with_corrupted=True)
    apart = measured(model, [collator([features[0]]), collator([features[1]])], (0.0, 1.0))
    together = measured(model, [collator([features[0], features[1]])], (0.0, 1.0))
    assert apart.keys() == together.keys()
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, abs=1e-4), name


def test_documents_without_labels_count_nowhere(model):
    features, collator = make_features(2, split="validation"), make_collator(model, with_corrupted=True)
    alone = measured(model, [collator([features[0]])], (0.0, 1.0))
    both = collator([features[0], features[1]])
    both["labels"][3:] = IGNORE_INDEX
    for name, value in measured(model, [both], (0.0, 1.0)).items():
        assert alone[name] == pytest.approx(value, abs=1e-4), name


def test_documents_without_true_notes_have_no_teacher(model, batch):
    blank = {**batch, "note_mask": torch.zeros_like(batch["note_mask"])}
    result = measured(model, [blank], (0.0,))
    assert not {"kd_ce_ratio", "rollback_kl", "repair_error_rate"} & result.keys()
    assert {"mask_ablation", "stability_kl"} <= result.keys()


def test_derived_by_hand():
    parts = {"kd": 0.2, "kd_ce": 2.0, "kd_mix_1": 0.0, "kd_ce_mix_1": 1.0, "coverage_precision": 0.5, "other_ce": 3.0}
    assert _derived({**parts, "coverage_recall": 1.0}) == {
        **{"kd_ce_ratio": 0.1, "kd_ce_ratio_mix_1": 0.0, "other_ce": 3.0},
        **{"coverage_precision": 0.5, "coverage_recall": 1.0, "coverage_f1": pytest.approx(2 / 3)},
    }
    assert "coverage_f1" not in _derived(parts)


def test_the_trainer_takes_the_mixes(tmp_path):
    logged = make_trainer(tmp_path, eval_bus_mixes=[0.0, 1.0]).evaluate()
    assert {"eval_mask_ablation", "eval_mask_ablation_mix_1", "eval_coverage_recall"} <= logged.keys()
    assert "eval_mask_ablation" not in make_trainer(tmp_path).evaluate()
    with pytest.raises(ValueError, match="eval_bus_mixes"):
        make_trainer(tmp_path, eval_bus_mixes=[2.0])


def test_mixes_are_shares(model):
    with pytest.raises(ValueError, match=r"bus_mixes holds 1\.5, allowed"):
        TeacherForcedMetrics(model, (0.0, 1.5))
