"""The chat teacher against a server on the loopback: good answers, bad ones, limits, budget, and what is kept."""

import pickle
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.chat_server import KINDS, Handler, chat_server, toy_document
from tests.child_process import exit_code, start_child, wait_until
from trainer_pdt.data.chat import ChatTeacher
from trainer_pdt.data.chat_answers import NotesAnswer, PlanAnswer, answer_schema
from trainer_pdt.data.chat_client import BudgetExceeded, ChatClient, ServerUnavailable
from trainer_pdt.data.chat_store import AnswerStore, Usage
from trainer_pdt.data.teachers import Rejection

PRICES = {"planner": (1.0, 2.0), "noter": (0.5, 1.0)}


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Requests to the loopback are requests, of child processes too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def make_teacher(server, folder, **choices):
    fast = {"backoff_s": 0.001, "timeout_s": 20.0, "max_concurrency": 4, "prices": PRICES}
    models = {"plan_model": "planner", "notes_model": "noter"}
    return ChatTeacher(base_url=server.url, store=folder / "answers.sqlite", **{**models, **fast, **choices})


def teach(teacher, sources):
    """What becomes of every document: (plan, notes) or the reason of its rejection."""

    def one(source):
        try:
            plan = teacher.plan(source)
            return plan, teacher.notes(source, plan)
        except Rejection as rejection:
            return rejection.reason

    with ThreadPoolExecutor(teacher.concurrency) as pool:
        return list(pool.map(one, sources))


def odd_handler(**changes):
    """What answers rightly but for some fields of the response."""

    class OddHandler(Handler):
        def completion(self, body, content, reason="stop"):
            return {**super().completion(body, content, reason), **changes}

    return OddHandler


def test_plan_and_notes_of_a_document(tmp_path):
    source = toy_document(7)
    with chat_server() as server:
        ((plan, notes),) = teach(make_teacher(server, tmp_path), [source])
    assert [stream.header for stream in plan.streams] == ["The mayor", "The harbour", "The festival"]
    assert [item.item_id for item in plan.items] == ["s0/mayor", "s1/harbour", "s2/festival"]
    told = [(n, s.kind, s.value, s.owner) for n, section in enumerate(notes) for s in section.spans]
    assert told == [
        (0, "own", "Arno7", 0),
        (1, "own", "Brno7", 1),
        (1, "sibling", "Arno7", 0),
        (2, "own", "Crno7", 2),
        (2, "sibling", "Arno7", 0),
    ]
    for stream, section in zip(plan.streams, notes, strict=True):
        text = source.text[stream.start : stream.end]
        assert all(text[span.start : span.end] == span.value for span in section.spans)
        assert [(f.subj_id, f.predicate, f.object) for f in section.facts] == [
            ("e0", s.cue, s.value) for s in section.spans
        ]


def test_models_schema_and_key_are_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with chat_server() as server:
        teach(make_teacher(server, tmp_path, api_key_variable="MY_KEY"), [toy_document(1)])
        plan, notes = server.bodies
        assert {headers["authorization"] for headers in server.headers_seen} == {"Bearer secret"}
    assert (plan["model"], notes["model"]) == ("planner", "noter")
    assert plan["response_format"]["json_schema"]["schema"] == answer_schema(PlanAnswer)
    assert notes["response_format"]["json_schema"]["schema"] == answer_schema(NotesAnswer)


def test_no_secret_goes_to_a_server_without_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with chat_server() as server:
        teach(make_teacher(server, tmp_path), [toy_document(1)])
        assert not [headers for headers in server.headers_seen if "hf_mine" in str(headers)]


def check_run(server, teacher, sources):
    """Every document has an end, counts add up, limits hold."""
    results = teach(teacher, sources)
    rejected = Counter(result for result in results if isinstance(result, str))
    assert len(results) == len(sources)
    assert server.most_active <= teacher.max_concurrency
    store = AnswerStore(teacher.store)
    outcomes, (tokens, cost) = store.outcomes(), store.spent()
    assert sum(outcomes.values()) == sum(server.calls.values())
    assert outcomes["finished"] <= len(server.good)
    assert 2 * (len(results) - sum(rejected.values())) <= outcomes["finished"] <= 2 * len(results)
    assert tokens > 0 < cost
    return results, rejected, outcomes


@pytest.mark.slow
def test_failures_of_every_kind_are_survived(tmp_path):
    sources = [toy_document(number) for number in range(60)]
    with chat_server(failures=0.3, hang=0.6) as server:
        teacher = make_teacher(server, tmp_path, timeout_s=0.5, attempts=10)
        results, rejected, outcomes = check_run(server, teacher, sources)
        assert set(server.outcomes) == {*KINDS, "good"}
    assert not rejected
    kinds = {"rate_limited", "server_error", "timed_out", "truncated_answer", "malformed_json", "wrong_schema"}
    assert outcomes.keys() == kinds | {"wrong_language", "connection_failed", "finished"}
    with chat_server() as server:
        assert teach(make_teacher(server, tmp_path / "calm"), sources) == results


@pytest.mark.soak
def test_two_thousand_documents(tmp_path):
    sources = [toy_document(number) for number in range(2000)]
    with chat_server(failures=0.3, hang=1.2) as server:
        teacher = make_teacher(server, tmp_path, timeout_s=1.0, attempts=4, max_concurrency=16)
        _, rejected, _ = check_run(server, teacher, sources)
    assert 0 < sum(rejected.values()) < 100


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("429", "rate_limited"),
        ("500", "server_error"),
        ("dropped", "connection_failed"),
        ("truncated", "truncated_answer"),
        ("malformed", "malformed_json"),
        ("schema", "wrong_schema"),
        ("language", "wrong_language"),
    ],
)
def test_the_last_failure_is_the_reason(tmp_path, kind, reason):
    with chat_server(failures=1.0, kinds=(kind,)) as server:
        assert teach(make_teacher(server, tmp_path, attempts=2), [toy_document(1)]) == [reason]
        assert sum(server.calls.values()) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": None},
        {"choices": []},
        {"choices": "text"},
        {"choices": [{"index": 0}]},
        {"choices": [{"message": {"role": "assistant", "content": None}}]},
        {"choices": [{"message": "text"}]},
        {"choices": {"message": {"content": "text"}}},
    ],
)
def test_a_response_without_a_text_rejects_its_document(tmp_path, changes):
    # Some of these raised an AttributeError, which stops a build.
    with chat_server(handler=odd_handler(**changes)) as server:
        assert teach(make_teacher(server, tmp_path, attempts=2), [toy_document(1)]) == ["malformed_response"]
        assert sum(server.calls.values()) == 2


@pytest.mark.parametrize(
    "usage", [None, {}, {"total_tokens": 12}, {"prompt_tokens": 9}, "many", {"prompt_tokens": "9"}]
)
def test_a_request_without_a_count_may_have_taken_the_most(tmp_path, usage):
    # A usage without both counts raised a TypeError, which stops a build.
    with chat_server(handler=odd_handler(usage=usage)) as server:
        teacher = make_teacher(server, tmp_path, plan_tokens=900, notes_tokens=1100)
        assert not isinstance(teach(teacher, [toy_document(1)])[0], str)
    assert AnswerStore(teacher.store).spent()[0] > 2000


def test_a_model_hears_what_was_wrong_and_may_write_more(tmp_path):
    with chat_server(failures=1.0, kinds=("schema",)) as server:
        teach(make_teacher(server, tmp_path, attempts=2), [toy_document(1)])
        assert "must be an object with ['prompt', 'streams']" in server.bodies[1]["messages"][2]["content"]
    with chat_server(failures=1.0, kinds=("truncated",)) as server:
        teach(
            make_teacher(server, tmp_path, attempts=4, plan_tokens=100, notes_tokens=100, max_answer_tokens=300),
            [toy_document(2)],
        )
        assert [body["max_tokens"] for body in server.bodies] == [100, 200, 300, 300]


def test_one_refused_request_is_a_reject_but_no_access_stops(tmp_path):
    with chat_server(failures=1.0, kinds=("400",)) as server:
        assert teach(make_teacher(server, tmp_path), [toy_document(1)]) == ["refused_request"]
        assert sum(server.calls.values()) == 1
    with chat_server(failures=1.0, kinds=("401",)) as server, pytest.raises(ServerUnavailable, match="401"):
        teach(make_teacher(server, tmp_path), [toy_document(1)])


def test_a_dead_server_stops_the_build(tmp_path):
    with chat_server(failures=1.0, kinds=("500",)) as server:
        teacher = make_teacher(server, tmp_path, attempts=3, max_concurrency=2)
        with pytest.raises(ServerUnavailable, match="6 requests in a row failed"):
            teach(teacher, [toy_document(number) for number in range(20)])
        # The last failure may find another request on its way.
        assert 6 <= sum(server.calls.values()) <= 7


def test_who_waits_for_a_place_knows_of_the_failure_that_left_it(tmp_path, monkeypatch):
    settle = ChatClient._settle

    def settle_late(client, *entry):
        time.sleep(0.05)
        settle(client, *entry)

    monkeypatch.setattr(ChatClient, "_settle", settle_late)
    with chat_server(failures=1.0, kinds=("500",)) as server:
        teacher = make_teacher(server, tmp_path, attempts=3, max_concurrency=1)
        with ThreadPoolExecutor(12) as pool:
            futures = [pool.submit(teacher.plan, toy_document(number)) for number in range(12)]
        assert {type(future.exception()) for future in futures} == {ServerUnavailable}
        assert sum(server.calls.values()) == 3


def test_a_dead_server_is_asked_no_more(tmp_path):
    with chat_server(failures=1.0, kinds=("500",)) as server:
        teacher = make_teacher(server, tmp_path, attempts=2, max_concurrency=1)
        for number in range(3):
            with pytest.raises(ServerUnavailable, match="2 requests in a row failed"):
                teacher.plan(toy_document(number))
        assert sum(server.calls.values()) == 2


def test_requests_that_wait_for_a_place_are_not_sent_to_a_dead_server(tmp_path):
    with chat_server(failures=1.0, kinds=("500",), latency=0.02) as server:
        teacher = make_teacher(server, tmp_path, attempts=4, max_concurrency=2)
        with ThreadPoolExecutor(12) as pool:
            futures = [pool.submit(teacher.plan, toy_document(number)) for number in range(12)]
        assert ServerUnavailable in {type(future.exception()) for future in futures}
        # The last failure may find another request on its way.
        assert 8 <= sum(server.calls.values()) <= 9
        assert server.most_active <= 2
    store = AnswerStore(tmp_path / "answers.sqlite")
    # A refused request costs nothing, and one that is not sent neither.
    assert store.spent() == (0, pytest.approx(0.0))
    assert store.outcomes().keys() == {"server_error", "stopped"}


def test_offline_mode_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with chat_server() as server, pytest.raises(ServerUnavailable, match="HF_HUB_OFFLINE"):
        teach(make_teacher(server, tmp_path), [toy_document(1)])


@pytest.mark.parametrize("cap", [{"budget_tokens": 25_000}, {"budget_usd": 0.012}])
def test_the_budget_is_a_cap_and_a_larger_one_goes_on(tmp_path, cap):
    sources = [toy_document(number) for number in range(15)]
    with chat_server(failures=0.2, kinds=("schema", "500")) as server:
        with pytest.raises(BudgetExceeded, match=next(iter(cap))):
            teach(make_teacher(server, tmp_path, **cap), sources)
        tokens, cost = AnswerStore(tmp_path / "answers.sqlite").spent()
        assert tokens <= cap.get("budget_tokens", tokens)
        assert cost <= cap.get("budget_usd", cost)
        paid = set(server.good)
        assert 0 < len(paid) < 30
        results = teach(make_teacher(server, tmp_path), sources)
        assert all(server.good[key] == 1 for key in server.good)
    assert not [result for result in results if isinstance(result, str)]


def test_answers_are_kept(tmp_path):
    sources = [toy_document(number) for number in range(5)]
    with chat_server() as server:
        first = teach(make_teacher(server, tmp_path), sources)
        assert teach(make_teacher(server, tmp_path), sources) == first
        assert sum(server.calls.values()) == 10
        teach(make_teacher(server, tmp_path, notes_model="other"), sources)
        assert sum(server.calls.values()) == 15


def kill_and_go_on(folder, documents, kills, latency):
    """No answer that a killed run had stored is asked for again, and the results are those of a quiet run."""
    sources = [toy_document(number) for number in range(documents)]
    with chat_server(latency=latency) as server:
        wanted = 0
        for _ in range(kills):
            wanted = sum(server.good.values()) + documents // (kills + 1)
            child = start_child(teach, make_teacher(server, folder), sources)
            wait_until(lambda: sum(server.good.values()) >= wanted or not child.is_alive())  # noqa: B023
            child.kill()
            exit_code(child)
            time.sleep(2 * latency)
        stored = AnswerStore(folder / "answers.sqlite").outcomes()
        asked = sum(server.calls.values())
        results = teach(make_teacher(server, folder), sources)
        assert stored["finished"] >= wanted - 8 * kills
        assert sum(server.calls.values()) - asked == 2 * documents - stored["finished"]
        assert stored.get("in_flight", 0) <= 8 * kills
    with chat_server() as server:
        assert teach(make_teacher(server, folder / "quiet"), sources) == results


def test_the_next_requests_are_sent_while_answers_are_read(tmp_path, monkeypatch):
    read = ChatTeacher._read_plan
    with chat_server() as server:

        def slow(*arguments):
            wait_until(lambda: sum(server.calls.values()) >= 4, 20.0)
            return read(*arguments)

        monkeypatch.setattr(ChatTeacher, "_read_plan", slow)
        results = teach(make_teacher(server, tmp_path, max_concurrency=2), [toy_document(n) for n in range(4)])
        assert server.most_active <= 2
    assert not [result for result in results if isinstance(result, str)]


@pytest.mark.slow
def test_no_call_is_repeated_after_a_kill(tmp_path):
    kill_and_go_on(tmp_path, documents=30, kills=1, latency=0.02)


@pytest.mark.soak
def test_no_call_is_repeated_after_ten_kills(tmp_path):
    kill_and_go_on(tmp_path, documents=200, kills=10, latency=0.02)


def test_estimates_come_before_any_request(tmp_path):
    source = toy_document(1, sections=4)
    with chat_server() as server:
        teacher = make_teacher(server, tmp_path, max_items=1)
        estimate = teacher.estimate(source)
        assert not server.calls
        assert not (tmp_path / "answers.sqlite").exists()
        teach(teacher, [source])
        tokens, cost = AnswerStore(tmp_path / "answers.sqlite").spent()
    assert estimate["requests"] == 2
    assert 0.5 * tokens < estimate["input_tokens"] + estimate["output_tokens"] < 3 * tokens
    assert 0.5 * cost < estimate["cost_usd"] < 4 * cost


def test_store_sums_hold_whatever_happens(tmp_path):
    store = AnswerStore(tmp_path / "a.sqlite", max_tokens=100)
    first = store.reserve("a", Usage(30, 30))
    assert store.reserve("b", Usage(30, 30)) is None
    store.settle(first, "finished", Usage(10, 5), "text")
    assert store.spent() == (15, 0.0)
    assert store.reserve("b", Usage(30, 55)) is not None
    store.close()
    again = AnswerStore(tmp_path / "a.sqlite")
    assert again.spent() == (100, 0.0)
    assert (again.answer("a"), again.answer("b")) == ("text", None)
    assert again.outcomes() == {"finished": 1, "in_flight": 1}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"max_streams": 9}, "max_streams is 9, must be 2 to 8"),
        ({"attempts": 0}, "attempts is 0, must be 1"),
        # The session of huggingface_hub opens no more connections: others waited for one until they timed out.
        ({"max_concurrency": 101}, "max_concurrency is 101, must be 1 to 100"),
        ({"budget_usd": 1.0, "prices": {}}, r"prices lacks \['noter', 'planner'\]"),
        ({"max_answer_tokens": 10}, "max_answer_tokens is 10, must be 3000"),
    ],
)
def test_fields_have_ranges(tmp_path, choices, message):
    with chat_server() as server, pytest.raises(ValueError, match=message):
        make_teacher(server, tmp_path, **choices)


def test_teachers_travel_without_their_client(tmp_path):
    with chat_server() as server:
        teacher = make_teacher(server, tmp_path, max_concurrency=1)
        teach(teacher, [toy_document(1)])
        assert pickle.loads(pickle.dumps(teacher)) == teacher
    assert teacher.concurrency == 2
    assert teacher.fingerprint("plans") == make_teacher(server, tmp_path, notes_model="x").fingerprint("plans")
    assert teacher.fingerprint("notes") != make_teacher(server, tmp_path, notes_model="x").fingerprint("notes")
