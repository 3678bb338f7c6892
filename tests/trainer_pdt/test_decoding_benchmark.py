"""The benchmark of decoding: what its sides run, what it counts, its bars and what it writes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer_pdt import decoding_workload
from trainer_pdt.decoding_benchmark import (
    DecodingBenchmarkArguments,
    bars,
    decoding_table,
    measure_trunk,
)
from trainer_pdt.decoding_workload import SHAPES, DecodingWorkload, forced_blocks
from trainer_pdt.parser import RecipeParser

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "model_type": "gpt_oss",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "vocab_size": 1216,
    "sliding_window": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SMALL = {
    "trunk": "tiny-random",
    "shapes": {"tiny-random": SHAPE},
    "tokenizer": str(ROOT / "recipes/tiny/trunk"),
    "block_size": 3,
    "prefixes": [12],
    "step_blocks": 1,
    "speed_blocks": 4,
    "growth_streams": [1, 2],
    "growth_prompts": [1],
    "rounds": 2,
    "growth_rounds": 1,
    "warmup": 0,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Report and folder of the command itself, on a tiny trunk."""
    folder = tmp_path_factory.mktemp("decoding")
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({**SMALL, "output": str(folder / "decoding.json")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        import benchmark

        return benchmark.main(["decode", "--config", str(recipe)]), folder


@pytest.fixture(scope="module")
def workload():
    return DecodingWorkload(DecodingBenchmarkArguments(**SMALL), "tiny-random")


def test_the_command_writes_every_measure_as_json_and_table(written):
    report, folder = written
    assert json.loads((folder / "decoding.json").read_text())["bars"] == report["bars"]
    measured = report["trunks"]["tiny-random"]
    assert set(measured["steps"]) == {"shared_prefill", "bus_off", "full"}
    for side in measured["steps"].values():
        assert side["first_s"] > 0 and side["step_s"] > 0 and side["held_bytes"] > 0
        assert side["step_ratio"]["n"] == 2
    assert measured["steps"]["shared_prefill"]["step_ratio"]["mean"] == 1
    assert [(one["prompts"], one["streams"], one["rows_growth"]) for one in measured["growth"]] == [
        (1, 1, 1),
        (1, 2, 2),
    ]
    table = (folder / "decoding.md").read_text()
    assert table == decoding_table(report)
    for bar in report["bars"]:
        assert f"| {bar['name']} | {bar['value']:.3f} |" in table


def test_the_speed_measure_withdraws_its_share_of_blocks_and_counts_the_calls(written):
    (one,) = written[0]["trunks"]["tiny-random"]["speed"]
    # 5 % of 3 * 4 blocks, at least one; that row needs one block more than its siblings.
    assert (one["retries"], one["calls"], one["tokens"]) == (1, (4 + 1) * 3, 3 * 4 * 3)
    for side, speedup in (("single", "speedup"), ("loop", "loop_speedup")):
        assert one[f"{side}_s"] > 0 and one[speedup]["n"] == 2


def test_a_retry_costs_its_block_and_no_further_call(written):
    assert written[0]["trunks"]["tiny-random"]["retry"] == {
        "block": 3,
        "retries": 1,
        "calls": 3,
        "lower": 3,
        "upper": 3,
    }


def test_memory_per_stream_is_what_the_formulas_say(written):
    memory = written[0]["trunks"]["tiny-random"]["memory"]
    assert memory["predicted"].keys() == memory["held"].keys()
    for kind, held in memory["held"].items():
        assert memory["predicted"][kind] == pytest.approx(held, rel=0.05), kind


def test_all_sides_write_as_many_rows_and_tokens_from_the_same_prompts(workload):
    ids = workload.prompts(2, 9, seed=1)
    assert torch.equal(ids, workload.prompts(2, 9, seed=1)) and not torch.equal(ids, workload.prompts(2, 9, seed=2))
    decodes = [run(ids, 2, 5) for run in (workload.batched, workload.bus_off, workload.full)]
    for decode in decodes:
        rows = decode.output if torch.is_tensor(decode.output) else decode.output.sequences
        assert rows.shape == (4, 14)
        assert torch.equal(rows[:, :9], ids.repeat_interleave(2, dim=0))
        assert decode.calls == 5 and decode.first_s + 4 * decode.step_s <= decode.total_s
    assert not torch.equal(decodes[0].output[0], decodes[0].output[1]), "rows of one prompt are drawn apart"


def test_no_token_of_the_trunk_ends_a_decode():
    shape = {**SHAPE, "eos_token_id": list(range(1, 1216))}
    workload = DecodingWorkload(DecodingBenchmarkArguments(**{**SMALL, "shapes": {"ending": shape}}), "ending")
    ids = workload.prompts(1, 9, seed=1)
    assert workload.batched(ids, 2, 5).output.shape == workload.full(ids, 2, 5).output.sequences.shape == (2, 14)


def test_exactly_the_blocks_named_are_withdrawn_once(workload):
    ids = workload.prompts(1, 9, seed=1)
    decode = workload.full(ids, 2, 9, [(0, 1), (1, 0), (1, 2)])
    withdrawn = decode.output.trace.of_kind("rollback")
    assert sorted((event["stream"], event["round"]) for event in withdrawn) == [(0, 1), (1, 0), (1, 2)]
    assert not any(event["forced"] for event in decode.output.trace.of_kind("commit"))
    assert len(forced_blocks(3, 20, 0.05, 0)) == len(set(forced_blocks(3, 20, 0.05, 0))) == 3
    assert forced_blocks(3, 20, 0.05, 0) != forced_blocks(3, 20, 0.05, 1)


def test_bars_say_met_and_missed():
    def measured(step, speedup, growth, calls, ratio):
        return {
            "steps": {side: {"step_ratio": {"mean": step}} for side in ("bus_off", "full")},
            "speed": [{"prefix": prefix, "speedup": {"mean": speedup}} for prefix in (256, 512, 1024)],
            "growth": [{"rows_growth": 1, "growth": 1.0}, {"rows_growth": 4, "growth": growth}],
            "retry": {"block": 12, "calls": calls, "lower": calls, "upper": calls},
            "memory": {"ratio": ratio},
        }

    good, bad = bars(measured(1.0, 1.5, 2.0, 12, 1.0)), bars(measured(1.2, 1.1, 4.4, 15, 0.9))
    assert [bar["name"] for bar in good] == [
        *("step, bus_off", "step, full", "speed, prefix 256", "speed, prefix 1024", "growth over rows"),
        *("retry, calls beyond its block", "retry, tokens fed again", "memory, distance from formula"),
    ]
    assert all(bar["met"] for bar in good) and not any(bar["met"] for bar in bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 1},
        {"speed_blocks": 1},
        {"prefixes": []},
        {"prefixes": [1]},
        {"retry_rate": 2},
        {"shapes": {"x": {"hidden_size": 16}}},
        {"shapes": {"gpt-oss-20b-random": SHAPE}},
    ],
)
def test_bad_arguments_name_field_and_allowed_values(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name}.*(allowed|at least)"):
        DecodingBenchmarkArguments(**{**SMALL, **changes})


def test_a_trunk_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(decoding_workload, "available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"trunk: 0\.0 GiB of weights do not fit device cpu, allowed"):
        DecodingWorkload(DecodingBenchmarkArguments(**SMALL), "tiny-random")


def test_the_20b_trunk_has_the_parameters_of_gpt_oss_20b():
    with torch.device("meta"):
        trunk = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["gpt-oss-20b-random"]))
    assert trunk.num_parameters() == pytest.approx(20.91e9, rel=1e-3)


def test_the_shipped_recipe_is_what_the_bars_are_about():
    recipe = ROOT / "recipes/benchmarks/decode.yaml"
    (shipped,) = RecipeParser(DecodingBenchmarkArguments).parse(["--config", str(recipe)])
    shape = shipped.shapes[shipped.trunk]
    assert (shape["model_type"], shape["hidden_size"], shape["num_hidden_layers"]) == ("gpt_oss", 512, 12)
    assert shipped.rounds >= 20 and shipped.prefixes == [256, 1024]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_measured_in_bf16_on_a_gpu():
    arguments = DecodingBenchmarkArguments(**{**SMALL, "device": "cuda", "dtype": "bfloat16"})
    measured = measure_trunk(arguments, "tiny-random")
    assert measured["retry"] == {"block": 3, "retries": 1, "calls": 3, "lower": 3, "upper": 3}
    assert measured["memory"]["ratio"] == pytest.approx(1, abs=0.05)
    assert measured["peak_device_bytes"] > 0
    assert len(bars(measured)) == 6
