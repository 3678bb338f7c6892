"""The training report: from files of a run to page and Markdown, and what happens to missing parts."""

import json
import re

import pytest

from trainer_pdt.evaluation.bars import HEALTH
from trainer_pdt.telemetry import write_json
from trainer_pdt.training_report import (
    gradients_table,
    last_evaluation,
    main,
    read_gradient_norms,
    stage_logs,
    stage_norms,
    values_table,
    write_training_report,
)

STAGES = [
    {"name": "bus", "first_step": 0, "last_step": 40, "train": ["snc", "writer"], "losses": {"lm_ce": 1.0}},
    {"name": "gate <b>", "first_step": 40, "last_step": 60, "train": ["agreement"], "losses": {"agree": 0.5}},
    {"name": "later", "first_step": 60, "last_step": 60, "train": ["stream"], "losses": {"stream": 1.0}},
]


def logs():
    entries = [
        {"step": step, "loss": 4 - step / 20, "loss_lm_ce": 3.0, "grad_norm": 0.5} for step in range(10, 50, 10)
    ]
    entries += [{"step": step, "loss": 1.0, "loss_agree": 2 / step} for step in (50, 60)]
    measures = {
        **{"eval_mask_ablation": 2.5, "eval_stability_kl": 0.9, "eval_n_sibling": 340, "eval_runtime": 3.0},
        **{"eval_mask_ablation_mix_1": 2.75, "eval_sibling_value_accuracy": 0.91, "eval_other_kl_trunk": 0.01},
    }
    return [*entries, {"step": 20, "eval_mask_ablation": 0.01}, {"step": 60, **measures}, {"step": 60, "total": 1}]


def norms(step, stage="bus", **losses):
    entries = {name: {"weight": 0.5, "all": norm, "snc": norm, "writer": 0.0} for name, norm in losses.items()}
    total = sum(norm or 0.0 for norm in losses.values())
    return {"step": step, "stage": stage, "losses": entries, "total": {"all": total, "snc": total, "writer": 0.0}}


def write_lines(path, lines, end="\n"):
    path.write_text("\n".join(json.dumps(line) for line in lines) + end, encoding="utf-8")


def write_run(folder):
    report = {"step": 60, "max_steps": 60, "seconds": 90.0, "seconds_per_step": 1.5, "logs": logs()}
    report |= {"gates": [0.25, 0.5], "skipped": [{"step": 7, "reason": "loss is nan", "documents": ["one", "<two>"]}]}
    write_lines(folder / "gradient_norms_from_0.jsonl", [norms(0, lm_ce=2.0, kd=4.0), norms(20, lm_ce=1.0, kd=2.0)])
    write_json(folder / "training_report.json", report)
    write_json(folder / "stage_history.json", {"stages": STAGES})
    write_json(folder / "manifest.json", {"seed": 3, "command": "recipes/train.py --seed 3"})
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_training_report(write_run(tmp_path_factory.mktemp("run")))


def test_page_shows_every_stage_with_curves(page):
    text = page.read_text(encoding="utf-8")
    assert page.name == "training_report.html"
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert text.count("data:image/png;base64,") == 4
    plots = {"all.png", "stage_1.png", "gradients_1.png", "stage_2.png"}
    assert {path.name for path in (page.parent / "training_plots").iterdir()} == plots
    for words in (
        *("60 of 60 optimizer steps, 1.5 minutes, 1.5 s per step, seed 3.", "recipes/train.py --seed 3"),
        *("Stage bus", "Stage gate &lt;b&gt;", "0.91", "a refresh changes what it should leave alone"),
        *('class="met">ok<', 'class="missed">look<', "True notes on the bus", "Gates", "0.2500", "Gradient norms"),
        *("Skipped steps", "loss is nan", "one, &lt;two&gt;"),
    ):
        assert words in text, words
    assert "Stage later" not in text and "<b>gate" not in text and "runtime" not in text


def test_markdown_links_its_figures(page):
    text = (page.parent / "training_report.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (page.parent / link).is_file()
    assert "| loss_lm_ce | 3.0000 | 3.0000 | 3.0000 | 3.0000 | 3.0000 | 4 |" in text
    assert "| mask_ablation | 2.500 | >= 0.1 | notes are not used | ok |" in text
    assert "| mask_ablation | 2.500 | 2.750 |" in text and "| n_sibling | 340 |" in text


def test_sections_come_in_a_reader_s_order(page):
    text = page.read_text(encoding="utf-8")
    titles = ["Run", "Skipped steps", "Curves", "Held-out documents", "Stage bus", "Stage gate &lt;b&gt;", "Commands"]
    assert re.findall("<h2>(.*?)</h2>", text) == titles


@pytest.mark.slow
def test_health_has_a_row_for_every_measure_that_was_taken(tmp_path):
    run = write_run(tmp_path)
    measures = {f"eval_{name}": limit for name, _, limit, _ in HEALTH}
    write_json(run / "training_report.json", {"step": 60, "max_steps": 60, "logs": [{"step": 60, **measures}]})
    text = write_training_report(run).read_text(encoding="utf-8")
    assert text.count('class="met">ok<') == len(HEALTH) and "look<" not in text


def test_gradient_norms_of_a_continued_run_count_once(tmp_path):
    first, second = tmp_path / "gradient_norms_from_0.jsonl", tmp_path / "gradient_norms_from_20.jsonl"
    write_lines(first, [norms(0, kd=1.0), norms(20, kd=2.0), norms(40, kd=3.0)])
    write_lines(second, [norms(20, kd=5.0), norms(30, kd=6.0)], end='\n{"step": 40, "los')
    lines = read_gradient_norms(tmp_path)
    assert [(line["step"], line["losses"]["kd"]["all"]) for line in lines] == [(0, 1.0), (20, 5.0), (30, 6.0)]
    # A line counts the steps finished before: 40 would be the first step of the second stage.
    assert [line["step"] for line in stage_norms([*lines, norms(40)], STAGES[0])] == [0, 20, 30]
    assert [line["step"] for line in stage_norms([*lines, norms(40)], STAGES[1])] == [40]
    assert read_gradient_norms(tmp_path / "nowhere") == []


def test_gradients_of_a_stage_by_hand():
    table = gradients_table([norms(0, lm_ce=2.0, kd=4.0), norms(20, lm_ce=1.0, kd=2.0), norms(30, lm_ce=0.0, kd=3.0)])
    assert table.rows == [
        ["lm_ce", "0.5", "2", "0", "1", "2", "snc", "3"],
        ["kd", "0.5", "4", "3", "3", "4", "snc", "3"],
    ]
    assert gradients_table([norms(0, lm_ce=None)]).rows == gradients_table([]).rows == []


def test_logs_belong_to_the_stage_that_made_them():
    training = {"logs": logs()}
    assert [entry["step"] for entry in stage_logs(training, STAGES[0])] == [10, 20, 30, 40]
    assert [entry["step"] for entry in stage_logs(training, STAGES[1])] == [50, 60]
    rows = {row[0]: row[1:] for row in values_table(training, STAGES[0]).rows}
    assert rows["loss"] == ["3.5000", "2.0000", "2.7500", "2.0000", "3.5000", "4"]
    assert list(rows) == ["loss", "loss_lm_ce", "grad_norm"]


def test_the_last_evaluation_counts():
    assert last_evaluation({"logs": logs()})["teacher_forced"]["mask_ablation"] == 2.5
    assert last_evaluation({"logs": logs()[:6]}) == {"teacher_forced": {}}


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    write_json(tmp_path / "training_report.json", {"step": 0, "max_steps": 60, "logs": []})
    main([str(tmp_path)])
    text = (tmp_path / "training_report.html").read_text(encoding="utf-8")
    assert "0 of 60 optimizer steps." in text and "<img" not in text and "<table" not in text
    assert (tmp_path / "training_report.md").read_text(encoding="utf-8").startswith("# Parallel Decoder Transformer")
