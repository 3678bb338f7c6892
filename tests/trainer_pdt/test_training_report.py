"""The training report: from files of a run to page and Markdown, and what happens to missing parts."""

import re

import pytest

from trainer_pdt.telemetry import write_json
from trainer_pdt.training_report import last_evaluation, main, stage_logs, values_table, write_training_report

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


@pytest.fixture
def run(tmp_path):
    report = {"step": 60, "max_steps": 60, "seconds": 90.0, "seconds_per_step": 1.5, "logs": logs()}
    write_json(tmp_path / "training_report.json", report)
    write_json(tmp_path / "stage_history.json", {"stages": STAGES})
    write_json(tmp_path / "manifest.json", {"seed": 3, "command": "recipes/train.py --seed 3"})
    return tmp_path


def test_page_shows_every_stage_with_curves(run):
    page = write_training_report(run)
    text = page.read_text(encoding="utf-8")
    assert page.name == "training_report.html"
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert text.count("data:image/png;base64,") == 3
    assert {path.name for path in (run / "training_plots").iterdir()} == {"all.png", "stage_1.png", "stage_2.png"}
    for words in (
        *("60 of 60 optimizer steps, 1.5 minutes, 1.5 s per step, seed 3.", "recipes/train.py --seed 3"),
        *("Stage bus", "Stage gate &lt;b&gt;", "0.91", "a refresh changes what it should leave alone"),
        *('class="met">ok<', 'class="missed">look<', "True notes on the bus"),
    ):
        assert words in text, words
    assert "Stage later" not in text and "<b>gate" not in text and "runtime" not in text


def test_markdown_links_its_figures(run):
    write_training_report(run)
    text = (run / "training_report.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (run / link).is_file()
    assert "| loss_lm_ce | 3.0000 | 3.0000 | 3.0000 | 3.0000 | 3.0000 | 4 |" in text
    assert "| mask_ablation | 2.500 | >= 0.1 | notes are not used | ok |" in text
    assert "| mask_ablation | 2.500 | 2.750 |" in text and "| n_sibling | 340 |" in text


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
