"""PDTTrainer: what learns, what is logged, what is written, and how the curriculum is carried out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_pdt import PDTAdapterConfig, PDTForParallelDecoding
from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_features, make_maker, make_model, make_trainer, weights
from trainer_pdt import PDTTrainingArguments
from trainer_pdt.arguments import CurriculumArguments, DataArguments, ModelArguments
from trainer_pdt.callbacks import carries_values, is_gate, parameter_group
from trainer_pdt.curriculum import PARAMETER_GROUPS
from trainer_pdt.data.publish import documents_to_dataset
from trainer_pdt.data.worlds import WorldOptions, generate_document, generate_documents
from trainer_pdt.features import load_features
from trainer_pdt.parser import RecipeParser
from trainer_pdt.telemetry import REPORT_FILE, STAGE_HISTORY_FILE
from trainer_pdt.trainer import COMPLETE_FILE, step_generator

ROOT = Path(__file__).resolve().parents[2]
TWO_STAGES = [{**BUS_STAGE, "until": 0.5}, HEAD_STAGE]


def changed_groups(before, after):
    return {parameter_group(name) for name in before if not torch.equal(before[name], after[name])}


class Snapshots(TrainerCallback):
    """Weights and learning rates before every step."""

    def __init__(self, model):
        self.model, self.weights, self.rates = model, [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.weights.append(weights(self.model))
        self.rates.append({(g["pdt_group"], g["params"][0].shape): g["lr"] for g in kwargs["optimizer"].param_groups})


def test_every_parameter_has_a_group():
    names = make_model().pdt_parameters()
    assert {parameter_group(name) for name in names} == set(PARAMETER_GROUPS)
    assert sum(is_gate(name) for name in names) == len(make_model().stack.snc)
    with pytest.raises(ValueError, match="belongs to no parameter group"):
        parameter_group("base_model.model.lm_head.weight")


def test_optimizer_groups(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e-2, gate_lr_scale=10.0, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert {group["pdt_group"] for group in groups} == set(PARAMETER_GROUPS)
    assert sum(len(group["params"]) for group in groups) == len(trainer.model.pdt_parameters())
    gates = [group for group in groups if group["pdt_group"] == "snc" and group["lr"] == pytest.approx(0.1)]
    assert len(gates) == 1
    assert len(gates[0]["params"]) == len(trainer.model.stack.snc)
    for group in groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].dim() > 1 else 0.0)


def test_a_stage_trains_exactly_its_groups(tmp_path):
    model = make_model()
    snapshots = Snapshots(model)
    trainer = make_trainer(
        tmp_path, TWO_STAGES, model, max_steps=8, weight_decay=0.1, callbacks=[snapshots], lr_scheduler_type="constant"
    )
    trainer.train()
    middle, last = snapshots.weights[4], weights(model)
    assert changed_groups(snapshots.weights[0], snapshots.weights[3]) == set(BUS_STAGE["train"])
    reader = [name for name in middle if "agreement.reader" in name]
    assert changed_groups({n: w for n, w in snapshots.weights[3].items() if n not in reader}, middle) == set(
        BUS_STAGE["train"]
    )
    assert changed_groups(middle, last) == set(HEAD_STAGE["train"])
    assert model.peft.active_peft_config.trained_parts == []
    trainer.save_model(str(tmp_path / "final"))
    assert set(model.peft.active_peft_config.trained_parts) == {*BUS_STAGE["train"], *HEAD_STAGE["train"]}


def test_every_stage_runs_the_whole_schedule(tmp_path):
    model = make_model()
    snapshots = Snapshots(model)
    trainer = make_trainer(
        tmp_path,
        TWO_STAGES,
        model,
        max_steps=12,
        callbacks=[snapshots],
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=50,
    )
    trainer.train()
    rates = {
        group: [max(v for k, v in r.items() if k[0] == group) for r in snapshots.rates]
        for group in ("writer", "coverage")
    }
    bus, heads = rates["writer"], rates["coverage"]
    assert bus[6:] == [0.0] * 6
    assert heads[:6] == [0.0] * 6
    assert bus[:6] == pytest.approx(heads[6:])
    assert bus[:3] == pytest.approx([0.0, 5e-3, 1e-2])
    assert 0 < bus[5] < bus[4] < 1e-2
    with pytest.raises(ValueError, match="lr_scheduler_type=reduce_lr_on_plateau, allowed"):
        make_trainer(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1).train()


def test_agreement_starts_from_the_trained_snc(tmp_path):
    model = make_model()
    snapshots = Snapshots(model)
    make_trainer(tmp_path, TWO_STAGES, model, max_steps=4, callbacks=[snapshots]).train()
    start = snapshots.weights[2]
    for name, value in start.items():
        if "agreement.reader" in name and not is_gate(name):
            site = name.replace("pdt_heads.default.agreement.reader", "pdt_snc.default.0")
            assert torch.equal(value, start[site])


def test_frozen_groups_do_not_count_in_clipping(tmp_path):
    trainer = make_trainer(tmp_path, [{**BUS_STAGE, "train": ["writer"]}], max_steps=1)
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = {n: p.grad for n, p in trainer.model.pdt_parameters().items()}
            norms.append({n: float(gradient.norm()) for n, gradient in gradients.items() if gradient is not None})

    trainer.add_callback(Norms())
    trainer.train()
    assert {parameter_group(name) for name, norm in norms[0].items() if norm > 0} == {"writer"}
    assert not trainer.model.pdt_parameters()[next(iter(norms[0]))]._backward_hooks


def test_only_what_learns_has_gradients_and_moments(tmp_path):
    stages = [
        {**BUS_STAGE, "train": ["writer", "encoder"], "losses": {"lm_ce": 1.0}, "until": 0.5},
        {**BUS_STAGE, "name": "next", "train": ["encoder", "coverage"], "losses": {"lm_ce": 1.0, "cov": 1.0}},
    ]
    trainer = make_trainer(tmp_path, stages, max_steps=4, gradient_accumulation_steps=2)
    named, seen = trainer.model.pdt_parameters(), []

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append({parameter_group(name) for name, p in named.items() if p.grad is not None})

        def on_optimizer_step(self, args, state, control, **kwargs):
            kept = kwargs["optimizer"].state
            seen.append({parameter_group(name) for name, p in named.items() if p in kept})
            # `lm_ce` does not reach the encoder of true notes, which learns all the same.
            assert all(p in kept for name, p in named.items() if ".encoder." in name)
            steps = {float(kept[p]["step"]) for name, p in named.items() if "encoder." in name}
            assert steps == {state.global_step + 1.0}

    trainer.add_callback(Seen())
    trainer.train()
    assert seen == [{"writer", "encoder"}] * 4 + [{"encoder", "coverage"}] * 4


def test_what_notes_carry_may_learn_more_slowly_or_stay(tmp_path):
    stages = [
        {**BUS_STAGE, "lr_scale": {"values": 0}, "until": 0.5},
        {**BUS_STAGE, "name": "slowly", "lr_scale": {"values": 0.1}, "until": 1.0},
    ]
    model = make_model()
    named = model.pdt_parameters()
    ends = ("0.v_proj.weight", "0.o_proj.weight", ".writer.out.weight")
    values = {name for name in named if name.endswith(ends) and "agreement" not in name}
    assert len(values) == 3 and values <= {name for name in named if carries_values(name)}
    start, seen = {name: parameter.detach().clone() for name, parameter in named.items()}, []

    class Seen(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            groups = kwargs["optimizer"].param_groups
            rates = {group["pdt_values"]: group["lr"] for group in groups if group["pdt_group"] == "writer"}
            same = {name for name in values if torch.equal(named[name], start[name])}
            with_moments = {name for name in values if named[name] in kwargs["optimizer"].state}
            seen.append((rates[True] / rates[False] if rates[False] else None, same, with_moments))

    make_trainer(tmp_path, stages, model, max_steps=4, warmup_steps=0, callbacks=[Seen()]).train()
    assert seen[:2] == [(0.0, values, set())] * 2
    assert [rate for rate, _, _ in seen[2:]] == pytest.approx([0.1, 0.1])
    assert seen[2][1:] == (set(), values)
    queries = [name for name in named if name.endswith("0.q_proj.weight") and "agreement" not in name]
    assert queries and not any(torch.equal(named[name], start[name]) for name in queries)


def test_trunk_bytes_do_not_change(tmp_path):
    model = make_model()
    before = {n: p.detach().clone() for n, p in model.peft.named_parameters() if "pdt_" not in n}
    make_trainer(tmp_path, TWO_STAGES, model, max_steps=4).train()
    for name, parameter in model.peft.named_parameters():
        if "pdt_" not in name:
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None


def test_loss_parts_are_logged_and_the_loss_falls(tmp_path):
    trainer = make_trainer(
        tmp_path,
        [{**BUS_STAGE, "losses": {"lm_ce": 1.0, "keep_close": 0.5}, "lag_jitter": 0.0}],
        max_steps=12,
        train_dataset=make_features(2),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 12
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["loss_lm_ce"] + 0.5 * entry["loss_keep_close"], abs=1e-4)
        assert entry["stage"] == 0
    assert logs[-1]["loss_lm_ce"] < logs[0]["loss_lm_ce"] - 0.2


def test_evaluation_reports_both_buses(tmp_path):
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate()
    assert metrics["eval_other_kl_trunk"] >= 0
    assert metrics["eval_n_sibling"] > 0
    for key in ("sibling_ce", "sibling_ce_ablated", "other_ce", "other_ce_trunk", "sibling_value_accuracy"):
        assert f"eval_{key}" in metrics
    assert metrics == {**metrics, **{k: v for k, v in trainer.evaluate().items() if "n_" in k or "ce" in k}}


def test_evaluation_needs_a_number_of_documents(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_features(2))

    with pytest.raises(ValueError, match="Evaluation: the dataset has no length"):
        make_trainer(tmp_path).evaluate(Endless())


def test_report_and_history(tmp_path):
    make_trainer(tmp_path, TWO_STAGES, max_steps=4).train()
    report = json.loads((tmp_path / REPORT_FILE).read_text())
    assert report["step"] == report["max_steps"] == 4
    assert report["seconds_per_step"] > 0
    assert all(0 < gate < 1 for gate in report["gates"])
    stages = json.loads((tmp_path / STAGE_HISTORY_FILE).read_text())["stages"]
    assert [(s["name"], s["first_step"], s["last_step"]) for s in stages] == [("bus", 0, 2), ("heads", 2, 4)]
    assert stages[1]["last_log"]["loss_cov"] > 0


def test_checkpoints_hold_adapters_only_and_stage_starts_stay(tmp_path):
    trainer = make_trainer(tmp_path, TWO_STAGES, max_steps=8, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert not list(tmp_path.glob("_saving-*"))
    last = tmp_path / "checkpoint-8"
    assert (last / COMPLETE_FILE).is_file()
    state = load_file(last / "adapter" / "adapter_model.safetensors")
    assert len(state) == len(trainer.model.pdt_parameters())
    assert not (last / "model.safetensors").exists()
    trunk = make_model().peft.unload()
    loaded = PDTForParallelDecoding.from_pretrained(last, trunk=trunk)
    for name, value in weights(trainer.model).items():
        assert torch.equal(loaded.pdt_parameters()[name], value)


def test_incomplete_checkpoints_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / COMPLETE_FILE).unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_noise_is_a_function_of_the_place_in_training():
    draws = [torch.rand(3, generator=step_generator(*place)) for place in [(1, 2, 0, 0), (1, 2, 1, 0), (1, 2, 0, 1)]]
    assert not any(torch.equal(a, b) for a, b in [draws[:2], draws[1:], draws[::2]])
    assert torch.equal(draws[0], torch.rand(3, generator=step_generator(1, 2, 0, 0)))


def test_bad_set_ups_are_refused(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns=True"):
        make_trainer(tmp_path, remove_unused_columns=True)
    model = make_model()
    next(iter(model.pdt_parameters().values())).requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen, allowed: all PDT parameters"):
        make_trainer(tmp_path, model=model)
    stage = {**BUS_STAGE, "losses": {"plan_snapshot": 1.0}}
    with pytest.raises(ValueError, match=r"stages\[bus\].losses.plan_snapshot needs a model with plan_on_bus=True"):
        make_trainer(tmp_path, [stage], make_model(plan_on_bus=False))


def test_the_tiny_recipe_builds_and_has_a_new_document_for_every_place():
    parser = RecipeParser(PDTAdapterConfig, ModelArguments, DataArguments, CurriculumArguments, PDTTrainingArguments)
    _, model, data, curriculum, arguments = parser.parse(["--config", str(ROOT / "recipes/tiny/train.yaml")])
    stages = curriculum.build(arguments.max_steps).stages
    assert stages[0].bus_mix == 0.0
    assert data.train_documents >= arguments.max_steps * arguments.per_device_train_batch_size
    assert not model.trunk.startswith("/")


def test_published_datasets_are_read_like_worlds(tmp_path):
    splits = DatasetDict(
        {
            split: documents_to_dataset(generate_documents(split, 0, 4, hard=index > 0))
            for index, split in enumerate(("train", "validation"))
        }
    )
    splits.save_to_disk(tmp_path / "data")
    maker = make_maker()
    train, held_out = load_features(DataArguments(str(tmp_path / "data"), 3, 2), maker, 0)
    assert (len(train), len(held_out)) == (3, 2)
    assert train[1] == make_maker_of(maker)(generate_document("train", 1, WorldOptions()))
    DatasetDict({"train": splits["train"]}).save_to_disk(tmp_path / "half")
    with pytest.raises(ValueError, match=r"lacks the splits \['validation'\]"):
        load_features(DataArguments(str(tmp_path / "half")), maker, 0)


def make_maker_of(maker):
    return replace(make_maker(), values=maker.values, items=maker.items)
