"""Where an evaluation and a calibration write when nobody says where."""

import pytest

from trainer_pdt.evaluation.arguments import CalibrationArguments, EvaluationArguments


def test_an_evaluation_is_written_beside_its_model(tmp_path, monkeypatch):
    # The default was the demo's folder: the evaluation of any model replaced the demo's.
    folder = tmp_path / "tour"
    folder.mkdir()
    for model in (str(folder), f"{folder}/"):
        assert EvaluationArguments(model=model).output_folder == str(tmp_path / "tour_evaluation")
    monkeypatch.chdir(folder)
    assert EvaluationArguments(model=".").output_folder == str(tmp_path / "tour_evaluation")
    assert EvaluationArguments(model=str(folder), output_folder="a").output_folder == "a"


def test_a_calibration_is_written_into_its_model(tmp_path):
    assert CalibrationArguments(model=str(tmp_path)).output_folder == str(tmp_path)
    assert CalibrationArguments(model=str(tmp_path), output_folder="a").output_folder == "a"


@pytest.mark.parametrize(("revision", "name"), [(None, "me--pdt"), ("refs/pr/1", "me--pdt@refs--pr--1")])
def test_models_of_the_hub_have_a_folder_each(tmp_path, monkeypatch, revision, name):
    monkeypatch.chdir(tmp_path)
    of_hub = {"model": "me/pdt", "revision": revision}
    assert EvaluationArguments(**of_hub).output_folder == f"build/evaluation/{name}"
    assert CalibrationArguments(**of_hub).output_folder == f"build/calibration/{name}"
