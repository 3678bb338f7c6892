"""Pushing goes through `Trainer`'s own path, with what a PDT model adds to it; no hub is reached."""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import trainer as transformers_trainer

from tests.tiny_training import make_model, make_trainer

INFERENCE = {"config.json", "generation_config.json", "modeling_pdt.py", "tokenizer.json", "adapter"}


class Hub:
    """Stands in for `HfApi`: remembers repositories, and what each upload would have sent."""

    def __init__(self):
        self.repositories, self.uploads = [], []

    def create_repo(self, name, **options):
        self.repositories.append(name)
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, *, folder_path, run_as_future=False, **options):
        folder = Path(folder_path)
        adapter = folder / "adapter" / "adapter_model.safetensors"
        content = {"files": {path.name for path in folder.iterdir()}, "adapter": adapter.read_bytes()}
        self.uploads.append({"folder": folder, **content, **options})
        done = Future()
        done.set_result(None)
        return done if run_as_future else "commit"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers_trainer, "hf_api", lambda: hub)
    return hub


def test_push_to_hub_uploads_the_model(tmp_path, hub):
    trainer = make_trainer(tmp_path, hub_model_id="mine")
    assert hub.repositories == []
    assert trainer.push_to_hub() == "commit"
    (upload,) = hub.uploads
    assert hub.repositories == ["mine"]
    assert (upload["repo_id"], upload["commit_message"]) == ("someone/mine", "End of training")
    assert upload["files"] >= INFERENCE | {"README.md"}
    assert not [name for name in upload["files"] if name.startswith("model") and name.endswith(".safetensors")]


def test_only_a_user_s_save_pushes(tmp_path, hub):
    trainer = make_trainer(tmp_path, push_to_hub=True)
    trainer.save_model(_internal_call=True)
    assert hub.uploads == []
    trainer.save_model()
    assert [upload["commit_message"] for upload in hub.uploads] == ["Model save"]


@pytest.mark.parametrize(
    "strategy", ["end", *(pytest.param(name, marks=pytest.mark.slow) for name in ("every_save", "all_checkpoints"))]
)
def test_checkpoints_are_pushed_when_they_are_complete(tmp_path, hub, strategy):
    trainer = make_trainer(
        tmp_path, push_to_hub=True, hub_strategy=strategy, save_strategy="steps", save_steps=1, max_steps=2
    )
    trainer.train()
    folders = [upload["folder"].name for upload in hub.uploads]
    assert (
        folders
        == {
            "end": [],
            "every_save": [tmp_path.name] * 2,
            "all_checkpoints": [tmp_path.name, "checkpoint-1", tmp_path.name, "checkpoint-2"],
        }[strategy]
    )
    for upload in hub.uploads:
        assert upload["files"] >= INFERENCE
        assert not [name for name in upload["files"] if "saving" in name]
        if upload["folder"].name != tmp_path.name:
            assert upload["path_in_repo"] == upload["folder"].name
            assert "complete.json" in upload["files"]
    if hub.uploads:
        assert hub.uploads[0]["adapter"] != hub.uploads[-1]["adapter"]


def test_what_is_written_or_deleted_meanwhile_is_never_uploaded(tmp_path, hub, monkeypatch):
    # Uploads run in threads: they sent checkpoints that were being deleted, or failed on files that went away.
    delete, replace, meanwhile = shutil.rmtree, os.replace, []

    def watched(folder, **choices):
        meanwhile.extend(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
        delete(folder, **choices)

    def renamed(source, target):
        meanwhile.append(Path(source).relative_to(tmp_path).as_posix())
        replace(source, target)

    monkeypatch.setattr(shutil, "rmtree", watched)
    monkeypatch.setattr(os, "replace", renamed)
    every = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    make_trainer(tmp_path, push_to_hub=True, hub_strategy="every_save", **every).train()
    for part in ("deleting-checkpoint-1/", "stage_history.json."):
        assert any(part in name for name in meanwhile)
    (ignored,) = {tuple(upload["ignore_patterns"]) for upload in hub.uploads}
    sent = filter_repo_objects(meanwhile, ignore_patterns=list(ignored))
    assert not [name for name in sent if "checkpoint-" in name or name.endswith(".tmp")]
    for step, upload in enumerate(hub.uploads, start=1):
        assert {name for name in upload["files"] if "checkpoint" in name} == {f"checkpoint-{step}"}


def test_a_trunk_of_this_machine_is_refused_before_training(tmp_path, hub):
    model = make_model()
    model.config.trunk_name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"is a local folder, allowed for pushing: a Hub id"):
        make_trainer(tmp_path / "run", model=model, push_to_hub=True)
    assert hub.repositories == []
