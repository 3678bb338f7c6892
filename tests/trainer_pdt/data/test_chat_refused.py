"""Answers that the chat teacher cannot use, whenever it finds out, and documents that no answer could serve."""

import json

import pytest

from tests.chat_server import Handler, chat_server, toy_document
from tests.data_builds import make_builder
from trainer_pdt.data.chat import ChatTeacher
from trainer_pdt.data.chat_answers import InvalidAnswer
from trainer_pdt.data.storage import read_json
from trainer_pdt.data.teachers import Rejection
from trainer_pdt.toy_endpoint import ToyHandler


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Requests to the loopback are requests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def choices(url):
    return {"base_url": url, "plan_model": "planner", "notes_model": "noter", "backoff_s": 0.0}


def make_teacher(url, folder):
    return ChatTeacher(**choices(url), store=folder / "answers.sqlite")


class HalfEmojiHandler(Handler):
    """Answers rightly, but for half of an emoji in a heading of town 3."""

    def answer(self, body):
        answer = super().answer(body)
        if "Arno3" in body["messages"][1]["content"] and "streams" in answer:
            answer["streams"][0]["header"] += " \ud83d"
        return answer


def test_half_of_a_character_rejects_its_document_alone(tmp_path):
    # Such an answer was stored as finished, and no shard could be written with it: the build failed with a
    # UnicodeEncodeError that named no document, and so did every restart.
    lines = []
    for source in map(toy_document, range(6)):
        sections = [{"header": header, "text": text} for header, text in source.sections]
        lines.append(json.dumps({"id": source.document_id, "title": source.title, "sections": sections}))
    (tmp_path / "towns.jsonl").write_text("\n".join(lines))
    files = {"kind": "jsonl", "files": [str(tmp_path / "towns.jsonl")], "name": "towns"}
    with chat_server(handler=HalfEmojiHandler) as server:
        builder = make_builder(
            tmp_path / "out",
            sources=[{**files, "columns": {"id": "id", "title": "title", "sections": "sections"}}],
            teacher="chat",
            teacher_options={**choices(server.url), "store": str(tmp_path / "answers.sqlite"), "attempts": 2},
            near_duplicates="keep",
        )
        builder.run()
        assert sum(server.calls.values()) == 2 + 5 * 2
    plans = read_json(tmp_path / "out" / "plans" / "manifest.json")
    assert (plans["rows"], plans["rejects"]) == (5, {"invalid_utf8": 1})


def test_a_stored_answer_that_is_refused_is_asked_for_again(tmp_path, monkeypatch):
    # It was raised as it is: where answers are checked for more than they were, no restart could end.
    source, read = toy_document(1), ChatTeacher._read_plan

    def stricter(teacher, source, passages, text):
        if "Describe the town" in text:
            raise InvalidAnswer("wrong_schema", "nothing is described.")
        return read(teacher, source, passages, text)

    with chat_server() as server:
        make_teacher(server.url, tmp_path).plan(source)
        monkeypatch.setattr(ChatTeacher, "_read_plan", stricter)
        monkeypatch.setattr(Handler, "answer", lambda *asked: {**ToyHandler.answer(*asked), "prompt": "Tell of it."})
        assert make_teacher(server.url, tmp_path).plan(source).prompt == "Tell of it."
        assert "nothing is described" in server.bodies[1]["messages"][2]["content"]
        # The new answer is the one that counts: nothing is asked a third time.
        assert make_teacher(server.url, tmp_path).plan(source).prompt == "Tell of it."
        assert sum(server.calls.values()) == 2


def test_no_model_is_asked_for_a_plan_that_cannot_exist(tmp_path):
    # A document of one passage took all attempts, each refused for its passages, and two requests in an estimate.
    source = toy_document(1, sections=1)
    with chat_server() as server:
        teacher = make_teacher(server.url, tmp_path)
        with pytest.raises(Rejection, match="1 passage") as caught:
            teacher.plan(source)
        assert not server.calls
    assert caught.value.reason == "too_few_sections"
    assert not teacher.estimate(source)
