"""A stored call runs again without its trunk and makes the same decisions."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_pdt.callbacks import MemoryRecorder, TokenRecorder
from modeling_pdt.interventions import Ablate, Intervention, RandomGate, Stale
from trainer_pdt.manifest import differences
from trainer_pdt.replay import ReplayRecorder, placeholder, replay

IDS = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
PLAN = [{"text": "one", "stream": 0}, {"text": "two", "stream": 1}, {"text": "three"}]


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [2 + ord(letter) % 90 for letter in text]}


def record(model, folder, chunk_calls=256, **options):
    options = {"num_streams": 3, "max_new_tokens": 10, "do_sample": True, "seed": 4, "top_k": 0, **options}
    with ReplayRecorder(folder, chunk_calls) as recorder:
        return model.generate(
            IDS,
            attention_mask=MASK,
            callbacks=[recorder, TokenRecorder()],
            return_dict_in_generate=True,
            **options,
        )


CALLS = {
    "plain": {"do_sample": False},
    "external plan": {
        "plan_texts": PLAN,
        "tokenizer": Letters(),
        "stream_prefixes": ["a", "bc", "def"],
        "agreement_threshold": 0.5,
    },
    "planner": {"plan": "planner", "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2},
    "rollbacks": {"agreement_threshold": 0.999, "max_retries": 3},
    "interventions": {"interventions": [Stale(rounds=2), RandomGate(rate=0.5, seed=3)], "agreement_threshold": 0.5},
    "end": {"eos_token_id": list(range(2, 30)), "min_new_tokens": 3, "agreement_threshold": 0.999},
    "control": {
        "cadence": {"mode": "adaptive", "interval": 3},
        "commit_horizon": 8,
        "gate_annealing": {"decay": 0.5},
        "logit_blend": 0.5,
        "commit_policy": "round",
        "retry_temperature": 0.25,
        "agreement_threshold": 0.5,
        "agreement_scaling": [0.5, 1.0],
        "retention": "scored",
        "bus_capacity": 2,
        "topology": [(0, 1), (1, 2)],
    },
    "attention": {
        "retention": "hybrid",
        "retention_score": "attention",
        "bus_capacity": 3,
        "block_size": 2,
        "max_new_tokens": 16,
        "agreement_threshold": 0.5,
    },
    "stall": {"agreement_threshold": 0.999, "max_retries": 2, "commit_policy": "stall"},
    "probe": {"do_sample": False, "sensitivity_probe": {"every": 1}},
    "two streams": {"num_streams": 2, "block_size": 3, "bus_lag": 2, "gate_scale": 0.0},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_replay_makes_the_same_decisions(model, tmp_path, name):
    model.config._adapter_config.trained_parts = ["agreement", "coverage"]
    output = record(model, tmp_path / "replay", **CALLS[name])
    again = replay(tmp_path / "replay")
    first, second = output.trace.to_manifest(), again.trace.to_manifest()
    assert list(differences(first, second)) == []
    assert torch.equal(output.sequences, again.sequences)
    assert [row.tolist() for row in output.merged] == [row.tolist() for row in again.merged]
    assert (name in ("rollbacks", "interventions", "end")) <= bool(output.trace.of_kind("rollback"))
    assert (name == "probe") == bool(output.trace.of_kind("sensitivity"))
    assert (name == "stall") == bool(output.trace.of_kind("stall"))
    assert first["timings"] != second["timings"]


def test_the_replay_has_no_trunk(model, tmp_path, monkeypatch):
    record(model, tmp_path / "first", agreement_threshold=0.5)
    (tmp_path / "first").rename(tmp_path / "moved")
    used = []
    monkeypatch.setattr("trainer_pdt.replay.placeholder", lambda record: used.append(placeholder(record)) or used[0])
    replay(tmp_path / "moved")
    trunk = used[0].stack.base_layer
    assert len(trunk.layers) == 1 and trunk.embed_tokens.weight.shape[0] == 1


def test_a_changed_tape_changes_the_answer_or_is_noticed(model, tmp_path):
    output = record(model, tmp_path)
    chunk = tmp_path / "tape-00000.safetensors"
    tensors = load_file(chunk)
    tensors["logits.3"] = tensors["logits.3"].flip(-1)
    save_file(tensors, chunk)
    again = replay(tmp_path)
    found = list(differences(output.trace.to_manifest(), again.trace.to_manifest()))
    assert any("token_id" in line or "tokens" in line for line in found)
    del tensors["notes.1"]
    save_file(tensors, chunk)
    with pytest.raises(RuntimeError, match=r"the replay asks for notes\.1"):
        replay(tmp_path)


def test_greedy_stores_two_logits_per_row(model, tmp_path):
    record(model, tmp_path / "greedy", do_sample=False)
    record(model, tmp_path / "sampled", chunk_calls=4)
    greedy = load_file(tmp_path / "greedy/tape-00000.safetensors")
    assert greedy["logits.1.values"].shape == (6, 2)
    assert len(list((tmp_path / "sampled").glob("tape-*.safetensors"))) == 3
    assert load_file(tmp_path / "sampled/tape-00000.safetensors")["logits.1"].shape == (6, 97)
    replay(tmp_path / "sampled")


class Custom(Intervention):
    name = "custom"


def test_what_cannot_be_stored_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="a replay cannot store logits_processor"):
        record(model, tmp_path, logits_processor=[lambda ids, scores: scores])
    with pytest.raises(ValueError, match="stop_strings or merge"):
        record(model, tmp_path, merge=lambda parts, results: parts[0])
    with pytest.raises(ValueError, match="a replay stores interventions of"):
        record(model, tmp_path, interventions=[Custom()])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="stores one call, inside a `with` statement"):
        model.generate(IDS, callbacks=[ReplayRecorder(tmp_path)])
    record(model, tmp_path, interventions=[Ablate(plan=True)])
    with pytest.raises(ValueError, match="holds a replay artefact"):
        ReplayRecorder(tmp_path)
    (tmp_path / "replay.json").unlink()
    with pytest.raises(ValueError, match=r"replay\.json is missing"):
        replay(tmp_path)


class Stop(TokenRecorder):
    def on_commit(self, decoder, event):
        raise KeyboardInterrupt


def test_an_interrupted_recording_leaves_the_model_as_it_was(model, tmp_path):
    options = {"num_streams": 3, "max_new_tokens": 10, "attention_mask": MASK}
    expected = model.generate(IDS, **options)
    with pytest.raises(KeyboardInterrupt), ReplayRecorder(tmp_path) as recorder:
        model.generate(IDS, callbacks=[recorder, Stop()], **options)
    assert not any(module._forward_hooks for module in model.modules())
    assert not (tmp_path / "replay.json").exists()
    assert torch.equal(model.generate(IDS, **options), expected)


def test_memory_is_measured_when_asked(model):
    output = model.generate(IDS, callbacks=[MemoryRecorder()], max_new_tokens=9, return_dict_in_generate=True)
    memory = output.trace.to_manifest()["memory"]
    rows, width = 6, model.config.trunk_hidden_size
    assert memory["tap_bytes"] == rows * 10 * width * 4
    assert memory["notes_bytes"] == rows * 8 * model.config.notes_per_block * model.config.notes_dim * 4
    layers, heads, head_dim = 4, 2, 8
    assert memory["cache_bytes"] >= layers * 2 * rows * heads * head_dim * 4 * 9
    assert memory["peak_device_bytes"] is None
