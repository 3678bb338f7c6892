"""The report: every table and figure of a full evaluation, and what happens to missing numbers and hostile text."""

import base64
import copy
import math
import re
from html.parser import HTMLParser

import pytest

from trainer_pdt.evaluation import plots, tables, values
from trainer_pdt.evaluation.answer_tables import ANSWER_TABLES
from trainer_pdt.evaluation.page import pieces_of
from trainer_pdt.evaluation.report import (
    RESULTS_END,
    RESULTS_START,
    commands_of,
    main,
    most_telling,
    read_training,
    update_readme,
    write_report,
)
from trainer_pdt.telemetry import write_json

PNG = b"\x89PNG\r\n\x1a\n"


def rate(mean, spread=0.04, n=412):
    return {"mean": mean, "low": max(0.0, mean - spread), "high": min(1.0, mean + spread), "n": n}


def example():
    """A made-up answer of three streams; the second rewrites its second block."""
    tokens = [f" word{number}" for number in range(24)]
    streams = [
        {"header": header, "text": "".join(tokens), "tokens": tokens, "blocks": [[0, 12], [12, 20], [20, 24]]}
        for header in ("Farming", "Places", "History")
    ]
    events = []
    for stream in range(3):
        for block, call in ((0, 12), (1, 20), (2, 24)):
            start, end = streams[stream]["blocks"][block]
            late = 8 if stream == 1 and block else 0
            event = {"stream": stream, "round": block, "start": start, "end": end, "call": call + late}
            if stream == 1 and block == 1:
                withdrawn = {**event, "call": call, "agreement": 0.31, "tokens": [" wrong", " words"]}
                events.append({"kind": "rollback", "attempt": 0, **withdrawn})
                event["attempt"] = 1
            events.append({"kind": "commit", "attempt": 0, "agreement": 0.93, **event})
    good, bad = "".join(tokens).index("word9"), "".join(tokens).index("word14")
    references = [
        {"stream": 1, "cue": "main crop", "start": good, "value": "word9", "consistent": True, "timing": "feasible"},
        {"stream": 2, "cue": "nearby river", "start": bad, "value": "word14", "consistent": False, "timing": "same"},
    ]
    return {
        "prompt": "Describe <Velmar> in three parts.",
        "streams": streams,
        "events": events,
        "references": references,
    }


def full_evaluation():
    """Made-up numbers in the form of `evaluation.json`."""
    recall = {mode: rate(0.05) for mode in tables.MODES}
    recall |= {"pdt": rate(0.62), "pdt_core": rate(0.77), "sequential": rate(0.93), "swapped_follow": rate(0.58)}
    training = {"seed": 1, "steps": 600, "seconds": 431.0, "command": "accelerate launch recipes/train.py"}
    return {
        "settings": {
            "command": "python recipes/evaluate.py --documents 200",
            **{"seed": 1, "documents": 200, "block_size": 12, "bus_lag": 1, "temperature": 1.0},
            "training": training,
        },
        "sibling_fact_recall": recall,
        "reference_classes": {"pdt": {"feasible": rate(0.62), "same": rate(0.02, n=41), "late": rate(0.3, n=20)}},
        "references_emitted": {"pdt": 0.97, "independent": rate(0.99)},
        "chance": {"overall": 0.0625, "by_cue": {"main crop": 0.0625, "mayor": 0.004}},
        "coverage": {
            **{"precision": rate(0.95, 0.01), "recall": rate(0.98, 0.01)},
            "heldout_wordings": {"precision": rate(0.94, 0.01), "recall": rate(0.96, 0.01)},
            "curve": [[1.0, 0.6, 0.02], [0.99, 0.93, 0.4], [0.98, 0.95, 0.5], [0.9, 0.99, 0.9]],
        },
        "agreement": {
            **{"auroc": rate(0.95, 0.02), "auroc_generated": 0.84, "zeroed_notes": 0.55},
            "controls": {"reference_present": 0.52, "logp_gap": 0.91, "logp_gap_generated": 0.77},
            "roc": [[0, 0], [0.05, 0.7], [0.2, 0.93], [1, 1]],
            "roc_generated": [[0, 0], [0.1, 0.5], [0.3, 0.8], [1, 1]],
            **{"threshold": 0.42, "repaired": rate(0.4), "false_rollback": rate(0.03), "blocks": 800, "positives": 90},
        },
        "calibration": {
            "agreement": {"rule": "the rule", "threshold": rate(0.42), "auroc": rate(0.8), "f1": 0.7, "points": []},
            "coverage": {"rule": "another", "threshold": rate(0.5), "expected_calibration_error": rate(0.05)},
        },
        "teacher_forced": {
            **{"mask_ablation": 2.5, "mask_ablation_mix_0.35": 2.6, "mask_ablation_mix_1": 2.8, "other_ce": 1.0},
            **{"stability_kl": 0.3, "stability_kl_mix_0.35": 0.2, "stability_kl_mix_1": 0.1, "n_other": 7},
        },
        "rollback": {
            flag: {
                **{"consistent": 360, "contradictory": 170, "rate": rate(0.68), "same_round": rate(0.2, n=51)},
                "blocks_rolled": 0 if flag == "none" else 120,
            }
            for flag in tables.FLAGS
        },
        "text_ce": {"pdt": 0.481, "trunk": 0.472, "kl": 0.012},
        "nli_violation": {"scorer": "worlds", "pdt": {"violation": rate(0.1), "contradicting": rate(0.2)}},
        "consistency": {"pdt": {"redundancy": rate(0.1), "attribute_consistency": rate(0.9)}},
        "similarity": {"pdt": {"rouge_l": rate(0.4), "tf_idf_cosine": rate(0.5), "words_more": rate(0.1)}},
        "judge": {
            "pdt_gate": {
                **{"model": "judge", "pairs": 8, "judged": 8, "stopped": None},
                "axes": {
                    "overall": {"net_win_rate": rate(0.1), "win": rate(0.3), "consistent": rate(0.9), "bias": None}
                },
            }
        },
        "dependency_ce": {
            **{"dependency": {"notes": rate(0.2), "no_notes": rate(1.8)}, "dependency_gain": {"no_notes": rate(1.6)}},
            **{"non_dependency": {"notes": rate(0.4)}, "non_dependency_gain": {"no_notes": rate(0.0)}},
        },
        "note_usage": {"gate": rate(0.5), "notes": rate(0.4), "source": rate(0.6), "source_even": rate(0.2)},
        "plan": {
            **{"owned_stated": rate(0.9), "mentions_on_plan": rate(0.92), "valid_values": rate(0.99)},
            **{"independent": {"owned_stated": rate(0.87)}, "sequential": {"valid_values": rate(0.98)}},
        },
        "speed": {
            "parallel_vs_single": {
                "mean": 1.62,
                "low": 1.55,
                "high": 1.7,
                "n": 9,
                "parallel_s": 0.61,
                "single_s": 1.0,
            },
            "overhead_vs_shared_prefill": {"mean": 1.4, "low": 1.3, "high": 1.5, "n": 9},
        },
        "bars": [
            {"name": "sibling-fact recall, all types", "value": rate(0.62), "bar": ">= 0.60", "met": True},
            {"name": "coverage recall", "value": 0.94, "bar": ">= 0.95", "met": False},
        ],
        "examples": [{**example(), "events": []}, example()],
    }


def training():
    history = [{"step": step, "loss": 3 / step, "loss_lm_ce": 2 / step, "epoch": 0.1} for step in range(10, 610, 10)]
    controls = {"eval_lm_ce_ablated": 3.0, "eval_other_kl_trunk": 0.1, "eval_runtime": 3.0, "eval_n_other": 7}
    history += [{"step": step, "eval_lm_ce": 2.5 / step, **controls} for step in (200, 400, 600)]
    return {
        "logs": history,
        "step": 600,
        "seconds": 431.5,
        "stages": [{"name": "notes", "start": 0}, {"name": "heads", "start": 400}],
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a full evaluation, in a folder of its own."""
    return write_report(full_evaluation(), training(), tmp_path_factory.mktemp("report"))


def test_page_is_self_contained_and_complete(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert len(images) == 7
    assert all(base64.b64decode(image).startswith(PNG) for image in images)
    for words in (
        "It met 1 of 2 bars; the others are marked",
        "PDT, notes on",
        "python recipes/evaluate.py --documents 200",
    ):
        assert words in text
    assert 'class="met">met<' in text and 'class="missed">missed<' in text
    assert "<del" in text and " wrong words</del>" in text
    assert {path.name for path in page.with_name("plots").iterdir()} == {
        *(
            "recall.png",
            "agreement.png",
            "coverage.png",
            "dependency.png",
            "judge.png",
            "learning.png",
            "timeline_2.png",
        ),
    }


def test_page_tags_are_balanced(page):
    stack = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Balance().feed(page.read_text(encoding="utf-8"))
    assert not stack


def test_text_is_escaped(tmp_path):
    evaluation = full_evaluation()
    hostile = "<script>alert(1)</script>"
    evaluation["settings"]["command"] = hostile
    evaluation["bars"][0]["name"] = hostile + "|"
    evaluation["examples"][0]["streams"][0]["tokens"][0] = hostile
    evaluation["examples"][0]["streams"][0]["header"] = hostile
    page = write_report(evaluation, None, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page and "&lt;Velmar&gt;" in page
    markdown = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "| &lt;script>alert(1)&lt;/script>\\| |" in markdown


def drop_each(data, path=()):
    """Yield the paths of all mapping entries."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield (*path, key)
            yield from drop_each(value, (*path, key))


@pytest.mark.parametrize("missing", ["dropped", "null", "nan"])
def test_missing_numbers_leave_their_row_out(missing):
    evaluation = full_evaluation()
    evaluation.pop("examples"), evaluation.pop("bars")

    def every(evaluation):
        return [*tables.all_tables(evaluation), *(maker(evaluation) for maker in ANSWER_TABLES)]

    whole = {table.title: len(table.rows) for table in every(evaluation)}
    assert all(whole.values())
    for path in list(drop_each(evaluation)):
        damaged = copy.deepcopy(evaluation)
        owner = damaged
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = {"null": None, "nan": math.nan}.get(missing)
        if missing == "dropped":
            del owner[path[-1]]
        for table in every(damaged):
            assert len(table.rows) <= whole[table.title]
            cells = [cell for row in table.rows for cell in row]
            assert not any(re.search(r"\bnan\b|None", cell) for cell in cells)


def test_calibration_health_and_mixes_are_shown():
    by_title = {table.title: table for table in tables.all_tables(full_evaluation())}
    calibration = by_title["Calibration"]
    assert [row[0] for row in calibration.rows] == [
        *("coverage: threshold", "coverage: expected calibration error"),
        *("agreement, own text: threshold", "agreement, own text: f1", "agreement, own text: auroc"),
    ]
    assert "coverage: another." in calibration.note and "agreement, own text: the rule." in calibration.note
    health = by_title["Health"]
    assert health.met == [True, False]
    assert health.rows[1] == [
        *("stability_kl", "0.300", "<= 0.2", "a refresh changes what it should leave alone", "look"),
    ]
    assert by_title["True notes on the bus"].columns == ("measure", "0 (decoding)", "0.35", "1")
    assert by_title["True notes on the bus"].rows == [
        ["mask_ablation", "2.500", "2.600", "2.800"],
        ["stability_kl", "0.300", "0.200", "0.100"],
    ]


def test_measures_of_the_plan_stand_beside_what_the_trunk_reaches():
    rows = [row[:2] for row in tables.text_table(full_evaluation()).rows]
    stated = rows.index(["owned items stated", "0.900"])
    assert rows[stated + 1 :] == [
        *(["- independent streams (trunk only)", "0.870"], ["mentions that are on the plan", "0.920"]),
        *(["mentions with a value of the cue's pool", "0.990"], ["- sequential, same trunk", "0.980"]),
    ]


def test_empty_evaluation_makes_a_page_without_tables(tmp_path):
    page = write_report({}, None, tmp_path).read_text(encoding="utf-8")
    assert "<table" not in page and "<img" not in page
    assert not (tmp_path / "plots").exists()


def test_measure_reads_numbers_and_rates():
    assert values.measure(0.5) == values.Measure(0.5)
    assert values.measure(rate(0.5, 0.1, 7)) == values.Measure(0.5, 0.4, 0.6, 7)
    for nothing in (None, "0.5", True, math.inf, {"mean": None, "n": 0}, {}):
        assert values.measure(nothing) is None
    assert values.show(rate(0.5, 0.125)) == "0.500 (0.375 to 0.625)"


def test_pieces_mark_references_across_blocks_and_put_withdrawn_text_first():
    stream = {"tokens": ["ab", "cd", "ef"], "blocks": [[0, 1], [1, 3]]}
    event = {"kind": "rollback", "start": 1, "end": 2, "round": 1, "attempt": 0, "agreement": 0.25, "text": "xy"}
    pieces = pieces_of(stream, [event], [{"start": 1, "value": "bc", "consistent": True}])
    assert [(piece["kind"], piece["text"], piece["block"]) for piece in pieces] == [
        *(("text", "a", 0), ("good", "b", 0), ("withdrawn", "xy", 1), ("good", "c", 1), ("text", "def", 1)),
    ]
    assert pieces[2]["title"] == "round 1, attempt 0, withdrawn, agreement 0.25"


def test_tokens_behind_the_text_are_not_shown():
    stream = {"tokens": ["ab", "cd", "<eos>"], "blocks": [[0, 2], [2, 3]], "text": "abcd"}
    assert "".join(piece["text"] for piece in pieces_of(stream, [], [])) == "abcd"


def test_withdrawn_block_without_text_is_counted():
    stream = {"tokens": ["ab", "cd"], "blocks": [[0, 2]]}
    event = {"kind": "rollback", "start": 0, "end": 2, "round": 0, "tokens": [17, 4], "agreement": None}
    assert pieces_of(stream, [event], [])[0]["text"] == "[2 tokens]"


def test_curves_keep_losses_and_held_out_measures_with_their_controls():
    panels = plots.curves(plots.log_history(training()))
    assert list(panels) == ["loss", "lm_ce", "other_kl_trunk", "loss_lm_ce"]
    assert list(panels["lm_ce"]) == ["held out", "bus off"]
    assert panels["lm_ce"]["bus off"] == [(200.0, 3.0), (400.0, 3.0), (600.0, 3.0)]
    assert len(panels["loss"]["train"]) == 60


def test_curves_put_bus_mixes_into_one_panel():
    entry = {"step": 5, "eval_stability_kl": 0.1, "eval_stability_kl_mix_0.35": 0.2, "eval_stability_kl_mix_1": 0.3}
    assert plots.curves([entry]) == {
        "stability_kl": {"held out": [(5.0, 0.1)], "true notes 0.35": [(5.0, 0.2)], "true notes 1": [(5.0, 0.3)]},
    }


def test_most_telling_example_has_a_rollback():
    assert most_telling(full_evaluation()["examples"]) == 1
    assert most_telling([{"events": []}]) == 0


def test_commands_come_in_order():
    assert commands_of(full_evaluation()) == [
        *("accelerate launch recipes/train.py", "python recipes/evaluate.py --documents 200"),
    ]


def test_readme_results_are_replaced_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{RESULTS_START}\nold\n{RESULTS_END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        update_readme(readme, full_evaluation())
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{RESULTS_START}\nThis run: 200 held-out documents")
    assert text.endswith(f"{RESULTS_END}\nafter\n")
    assert "| decoding | visible earlier round | same round | later round |" in text
    assert "old" not in text and text.count("| coverage recall | 0.940 | >= 0.95 | missed |") == 1


@pytest.mark.parametrize("text", ["", RESULTS_START, f"{RESULTS_END}{RESULTS_START}"])
def test_readme_without_markers_is_refused(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="must hold <!-- results:start -->"):
        update_readme(readme, full_evaluation())
    assert readme.read_text(encoding="utf-8") == text


def test_command_line(tmp_path):
    measured = {name: full_evaluation()[name] for name in ("settings", "bars")}
    evaluation = write_json(tmp_path / "evaluation.json", measured)
    report = training()
    write_json(tmp_path / "stage_history.json", {"stages": report.pop("stages")})
    write_json(tmp_path / "manifest.json", {"seed": 3, "command": "train.py"})
    main([str(evaluation), "--training", str(write_json(tmp_path / "training_report.json", report))])
    facts = read_training(tmp_path / "training_report.json")
    del measured["settings"]["training"]
    assert "one training seed (3)" in write_report(measured, facts, tmp_path / "two").read_text(encoding="utf-8")
    assert facts["training"] == {"seed": 3, "steps": 600, "seconds": 431.5, "command": "train.py"}
    assert [stage["name"] for stage in facts["stages"]] == ["notes", "heads"]
    assert (tmp_path / "index.html").exists() and (tmp_path / "plots" / "learning.png").exists()
    readme = tmp_path / "README.md"
    readme.write_text(f"{RESULTS_START}\n{RESULTS_END}\n", encoding="utf-8")
    main(["--readme", str(evaluation), "--readme_file", str(readme)])
    assert "| bar | measured | wanted | result |" in readme.read_text(encoding="utf-8")
