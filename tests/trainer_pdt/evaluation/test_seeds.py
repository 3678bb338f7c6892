"""The table over training seeds."""

import json

import pytest

from trainer_pdt.evaluation.seeds import main, seeds_table


def evaluation(seed, recall, chance=0.05):
    bars = [
        {"name": "recall", "value": recall, "bar": ">= 0.6", "met": recall >= 0.6},
        {"name": "zeroed at chance", "value": chance, "bar": "<= 0.09", "met": chance <= 0.09},
    ]
    return {"settings": {"training": {"seed": seed}}, "bars": bars}


def test_the_mean_decides():
    table = seeds_table([evaluation(1, 0.55), evaluation(2, 0.7, 0.1), evaluation(3, 0.58, 0.14)])
    assert table.columns == (
        "measure",
        "seed 1",
        "seed 2",
        "seed 3",
        "mean",
        "standard deviation",
        "bar",
        "by the mean",
    )
    assert table.rows[0] == ["recall", "0.550", "0.700", "0.580", "0.610", "0.079", ">= 0.6", "met"]
    assert table.rows[1][-1] == "missed" and table.met == [True, False]


def test_one_seed_or_other_bars_are_refused():
    with pytest.raises(ValueError, match="evaluations: 1 given, must be at least 2"):
        seeds_table([evaluation(1, 0.5)])
    other = evaluation(2, 0.5)
    other["bars"].pop()
    with pytest.raises(ValueError, match="different bars"):
        seeds_table([evaluation(1, 0.5), other])


def test_the_file_names_its_command(tmp_path):
    for seed in (1, 2):
        (tmp_path / f"{seed}.json").write_text(json.dumps(evaluation(seed, 0.7)))
    main([str(tmp_path / "1.json"), str(tmp_path / "2.json"), "--output", str(tmp_path / "seeds.md")])
    text = (tmp_path / "seeds.md").read_text()
    assert f"Written by `python -m trainer_pdt.evaluation.seeds {tmp_path}/1.json {tmp_path}/2.json --output" in text
    assert "| recall | 0.700 | 0.700 | 0.700 | 0.000 | >= 0.6 | met |" in text
