import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from trainer_pdt import curriculum as curriculum_module
from trainer_pdt.curriculum import LOSS_NAMES, METRIC_NAMES, PARAMETER_GROUPS, Curriculum, Stage

STAGES = [
    {"name": "plan", "until": 0.25, "train": ["planner", "encoder"], "losses": {"planner": 1.0, "notes": 1}},
    {
        "name": "bus",
        "until": 0.75,
        "train": ["snc", "writer"],
        "losses": {"lm_ce": 1.0, "kd": 0.0},
        "bus_mix": 0.5,
        "lag_jitter": 0.25,
        "lr_scale": {"snc": 2.0},
    },
    {
        "name": "gate",
        "until": 1.0,
        "train": ["agreement", "coverage"],
        "losses": {"agree": 1.0, "cov": 0.2},
        "data": "corrupted",
    },
]


def changed(index, **values):
    stages = [dict(entry) for entry in STAGES]
    stages[index].update(values)
    return stages


def test_shares_and_steps_give_the_same_curriculum():
    by_share = Curriculum.from_list(STAGES, 40)
    by_step = Curriculum.from_list(
        [dict(entry, until=until) for entry, until in zip(STAGES, (10, 30, 40), strict=True)], 40
    )
    assert by_share == by_step
    assert [stage.until for stage in by_share.stages] == [10, 30, 40]
    assert by_share.max_steps == 40 and by_share.starts == (0, 10, 30)


def test_the_number_one_is_a_step_and_one_point_zero_is_all():
    stages = [dict(STAGES[0], until=1), dict(STAGES[1], until=1.0)]
    assert [stage.until for stage in Curriculum.from_list(stages, 8).stages] == [1, 8]


def test_stage_at_the_boundaries():
    curriculum = Curriculum.from_list(STAGES, 40)
    names = [curriculum.stage_at(step).name for step in (0, 9, 10, 29, 30, 39, 40)]
    assert names == ["plan", "plan", "bus", "bus", "gate", "gate", "gate"]
    assert [curriculum.index_at(step) for step in (0, 10, 40)] == [0, 1, 2]
    for step in (-1, 41):
        with pytest.raises(ValueError, match=f"step={step}, allowed: a number at least 0 and at most 40"):
            curriculum.stage_at(step)


def test_multiplier():
    curriculum = Curriculum.from_list(STAGES, 40)
    assert curriculum.multiplier(0, "planner") == 1.0
    assert curriculum.multiplier(0, "snc") == 0.0
    assert curriculum.multiplier(10, "snc") == 2.0
    assert curriculum.multiplier(10, "writer") == 1.0
    assert curriculum.multiplier(30, "snc") == 0.0
    with pytest.raises(ValueError, match="'trunk' is unknown"):
        curriculum.multiplier(0, "trunk")


def test_values_have_a_factor_of_their_own():
    entry = dict(STAGES[1], until=1.0)
    stage = Curriculum.from_list([{**entry, "lr_scale": {"snc": 0.5, "values": 0.1}}], 8).stages[0]
    assert stage.multiplier("snc") == 0.5 and stage.multiplier("snc", True) == pytest.approx(0.05)
    assert stage.multiplier("writer") == 1.0 and stage.multiplier("writer", True) == 0.1
    kept = Curriculum.from_list([{**entry, "lr_scale": {"values": 0}}], 8)
    assert kept.multiplier(0, "snc") == 1.0 and kept.multiplier(0, "snc", True) == 0.0
    with pytest.raises(ValueError, match=r"lr_scale.values=-1"):
        Curriculum.from_list([{**entry, "lr_scale": {"values": -1}}], 8)
    heads = {"name": "heads", "until": 1.0, "train": ["coverage"], "losses": {"cov": 1.0}}
    with pytest.raises(ValueError, match=r"lr_scale: 'values' is unknown"):
        Curriculum.from_list([{**heads, "lr_scale": {"values": 0.1}}], 8)


def test_a_loss_of_weight_zero_is_not_active():
    bus = Curriculum.from_list(STAGES, 40).stages[1]
    assert bus.active_losses == ("lm_ce",)
    assert bus.is_active("lm_ce") and not bus.is_active("kd") and not bus.is_active("agree")
    with pytest.raises(ValueError, match=r"'agreement' is unknown .*did you mean 'agree'"):
        bus.is_active("agreement")


def test_history_covers_every_step_and_is_json():
    history = Curriculum.from_list(STAGES, 40).history()
    assert json.loads(json.dumps(history)) == history
    assert [(record["start"], record["until"], record["steps"]) for record in history] == [
        (0, 10, 10),
        (10, 30, 20),
        (30, 40, 10),
    ]
    assert history[1]["train"] == ["snc", "writer"] and history[1]["bus_mix"] == 0.5
    assert all(set(record["train"]) | set(record["frozen"]) == set(PARAMETER_GROUPS) for record in history)


def test_a_stage_is_frozen_and_the_recipe_is_not_written_to():
    stages = changed(1)
    stage = Curriculum.from_list(stages, 40).stages[1]
    with pytest.raises(FrozenInstanceError):
        stage.bus_mix = 0.0
    stage.losses["kd"] = 1.0
    assert stages[1] == STAGES[1] and STAGES[1]["losses"]["kd"] == 0.0


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (
            0,
            {"bus_mixx": 0.5},
            r"stages\[0\]: 'bus_mixx' is unknown \(did you mean 'bus_mix'\?\), allowed: name, until",
        ),
        (0, {"train": ["planer"]}, r"stages\[plan\].train: 'planer' is unknown \(did you mean 'planner'\?\)"),
        (0, {"train": "planner"}, r"train='planner', allowed: a list of names"),
        (0, {"train": []}, "train is empty"),
        (0, {"train": ["planner", "planner"]}, "repeats a group"),
        (0, {"losses": {"planers": 1.0}}, r"losses: 'planers' is unknown \(did you mean 'planner'\?\)"),
        (0, {"losses": {"nli": 1.0}}, "'nli' is unknown"),
        (0, {"losses": ["planner"]}, "allowed: a mapping from name to number"),
        (0, {"losses": {"planner": -1.0}}, "losses.planner=-1.0, allowed: a number at least 0.0"),
        (0, {"losses": {"planner": "1e-3"}}, "losses.planner='1e-3'"),
        (0, {"losses": {"planner": 0.0}}, "has no weight above 0"),
        (0, {"until": 0.0}, r"until=0.0, allowed: a step 1 to 40 or a share"),
        (0, {"until": 1.5}, r"until=1.5"),
        (0, {"until": 41}, "until=41"),
        (0, {"until": True}, "until=True"),
        (0, {"until": 0.01}, "until=0.01 of max_steps=40 is no step"),
        (1, {"until": 10}, r"stages\[bus\].until=10, allowed: a step above 10"),
        (2, {"until": 39}, r"stages\[gate\].until=39, allowed for the last: 40 or 1.0"),
        (1, {"name": "plan"}, "'plan' is used twice"),
        (1, {"name": 3}, "name=3"),
        (1, {"bus_mix": 1.5}, r"stages\[bus\].bus_mix=1.5, allowed: a number at least 0.0 and at most 1.0"),
        (1, {"bus_mix": "half"}, "bus_mix='half'"),
        (1, {"note_noise": -0.1}, "note_noise=-0.1"),
        (1, {"data": "corupted"}, r"data: 'corupted' is unknown \(did you mean 'corrupted'\?\)"),
        (1, {"lr_scale": {"planner": 2.0}}, "lr_scale: 'planner' is unknown.*allowed: snc, writer"),
        (1, {"lr_scale": {"snc": 0.0}}, "lr_scale.snc=0.0, allowed: a number above 0.0"),
        (2, {"losses": {"cov": 1.0}}, "'agreement' learns from none of the losses .* together with agree"),
    ],
)
def test_bad_stages_are_named(index, values, message):
    with pytest.raises(ValueError, match=message):
        Curriculum.from_list(changed(index, **values), 40)


def test_bad_lists_are_named():
    with pytest.raises(ValueError, match="stages is empty"):
        Curriculum.from_list([], 4)
    with pytest.raises(ValueError, match="allowed: a list of mappings"):
        Curriculum.from_list({"name": "a"}, 4)
    with pytest.raises(ValueError, match=r"stages\[0\]='plan'"):
        Curriculum.from_list(["plan"], 4)
    with pytest.raises(ValueError, match="lacks train, losses"):
        Curriculum.from_list([{"name": "a", "until": 1.0}], 4)
    for max_steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"max_steps={max_steps}"):
            Curriculum.from_list(STAGES, max_steps)


def test_names_do_not_overlap():
    assert not set(LOSS_NAMES) & set(METRIC_NAMES)
    assert Stage(name="a", until=1, train=tuple(PARAMETER_GROUPS), losses=dict.fromkeys(LOSS_NAMES, 1.0))


def test_needs_no_torch():
    folder = Path(curriculum_module.__file__).parent
    code = "import sys, curriculum; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, check=False).returncode == 0
