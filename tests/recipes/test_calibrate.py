"""recipes/calibrate.py on a tiny model: files in the model's folder, taken up by the next load."""

from types import SimpleNamespace

import pytest

from modeling_pdt import PDTForParallelDecoding
from recipes import calibrate
from tests.tiny_training import make_model, tokenizer
from trainer_pdt.data.counting import StreamText
from trainer_pdt.evaluation import suite
from trainer_pdt.telemetry import read_json


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a model. The worlds' own sections stand in for what it writes; every item is covered at the end."""

    def write(model, tokenizer, documents, **options):
        texts = [[StreamText(stream.text, (len(stream.text),)) for stream in d.streams] for d in documents]
        events = [
            [
                {"kind": "commit", "stream": item.stream, "round": 0, "coverage": {str(index): 0.5 + index / 100}}
                for index, item in enumerate(document.items)
            ]
            for document in documents
        ]
        return SimpleNamespace(texts=texts, events=events, results=[])

    monkeypatch.setattr(suite, "write_parallel", write)
    monkeypatch.setattr(suite, "VALUE_DOCUMENTS", 60)
    model, folder = make_model(), tmp_path / "model"
    model.save_pretrained(folder, include_trunk=True)
    tokenizer().save_pretrained(folder)
    return folder


def test_thresholds_reach_the_next_load(folder, tmp_path):
    report = calibrate.main(["--model", str(folder), "--calibration_documents", "4", "--threads", "1"])
    assert set(report) == {"agreement", "agreement_judgeable", "agreement_planted", "coverage"}
    loaded = PDTForParallelDecoding.from_pretrained(folder).generation_config
    for head in ("agreement", "coverage"):
        written = read_json(folder / f"{head}_thresholds.json")
        assert (
            written[f"{head}_threshold"] == report[head]["threshold"]["mean"] == getattr(loaded, f"{head}_threshold")
        )
        assert written["rule"] and len(written["roc_points"]) == 49
    assert not (tmp_path / "build").exists()


def test_thresholds_are_written_where_asked(folder, tmp_path):
    # The option was ignored for a folder, whose own thresholds were replaced.
    other = tmp_path / "other"
    words = ["--model", str(folder), "--output_folder", str(other)]
    report = calibrate.main([*words, "--calibration_documents", "4", "--threads", "1"])
    for head in ("agreement", "coverage"):
        written = read_json(other / f"{head}_thresholds.json")
        assert written[f"{head}_threshold"] == report[head]["threshold"]["mean"]
    assert (other / "generation_config.json").is_file()
    assert not list(folder.glob("*_thresholds.json"))


def test_options_of_an_evaluation_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="core_documents"):
        calibrate.main(["--model", str(tmp_path), "--core_documents", "4"])
