"""What a visitor asks for becomes a call, and what the call writes a board."""

import dataclasses
import threading

import pytest

from modeling_pdt.readings import ReadingRecorder
from pdt_space.session import ModelShelf, Wish, answer, decode, make_call, outline_of

OUTLINE = "1. Farming: main crop; orchard fruit\n2. Places: nearby river\n3. People: mayor"
WISH = Wish("Describe the town of Velmar.", plan="text", outline=OUTLINE, max_new_tokens=20, seed=3)


@pytest.fixture(scope="module")
def boards(loaded):
    """An answer of whose blocks about a third is withdrawn, slow enough to be seen growing."""
    wish = dataclasses.replace(WISH, interventions=("random_gate:0.3",), calls_per_second=25)
    return list(decode(loaded, wish, "Answer"))


def test_the_plan_of_the_editor_is_in_the_prompt_and_on_the_bus(loaded):
    prompt, options = make_call(WISH, loaded.tokenizer)
    assert prompt == f"{WISH.prompt}\n{OUTLINE}\n\n"
    assert options["plan"] is None and options["num_streams"] == 3 and options["seed"] == 3
    assert options["plan_texts"][1] == {"text": "orchard fruit", "stream": 0}
    assert options["stream_prefixes"] == ["## Farming\n", "## Places\n", "## People\n"]
    assert make_call(dataclasses.replace(WISH, plan="trunk"), loaded.tokenizer)[1]["plan"] == "trunk"
    assert make_call(dataclasses.replace(WISH, temperature=0), loaded.tokenizer)[1]["do_sample"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "Write a request first"),
        ({"num_streams": 2}, r"The plan has 3 lines .* must have 2"),
        ({"interventions": ("ablait",)}, r"interventions must be of .* got \['ablait'\]"),
    ],
)
def test_what_cannot_be_done_is_said(loaded, change, message):
    with pytest.raises(ValueError, match=message):
        make_call(dataclasses.replace(WISH, **change), loaded.tokenizer)


def test_the_last_board_is_what_generate_returns(loaded, boards):
    prompt, options = make_call(dataclasses.replace(WISH, interventions=("random_gate:0.3",)), loaded.tokenizer)
    inputs = loaded.tokenizer([prompt], return_tensors="pt", add_special_tokens=False)
    call = {"tokenizer": loaded.tokenizer, "callbacks": [ReadingRecorder()], "return_dict_in_generate": True}
    output = loaded.model.generate(inputs["input_ids"], **call, **options)
    board, trace = boards[-1], output.trace
    assert board.done and board.calls == trace.calls
    assert [column.title for column in board.columns] == ["Farming", "Places", "People"]
    for column, stream in zip(board.columns, output.streams[0], strict=True):
        assert column.text == loaded.tokenizer.decode(stream.token_ids, skip_special_tokens=True)
        assert (column.withdrawn, column.finished) == (stream.retries, stream.finished)
        assert len(column.standing) == len(stream.blocks) and not column.live and column.draft == ""
    assert board.tokens == sum(len(stream.token_ids) for stream in output.streams[0])
    assert sum(column.withdrawn for column in board.columns) == len(trace.of_kind("rollback")) > 0
    items = [(text, coverage) for column in board.columns for text, coverage in column.items]
    covered = [stream.coverage for stream in output.streams[0]]
    assert items[:2] == [("main crop", covered[0][0]), ("orchard fruit", covered[0][1])]
    readings = [block.reading for column in board.columns for block in column.blocks]
    assert sorted(map(str, readings)) == sorted(map(str, trace.readings))


def test_a_block_that_waits_keeps_its_text(loaded):
    choices = {"interventions": ("random_gate:0.4",), "commit_policy": "stall", "calls_per_second": 60}
    wish = dataclasses.replace(WISH, **choices)
    assert make_call(wish, loaded.tokenizer)[1]["commit_policy"] == "stall"
    seen = list(decode(loaded, wish, "Answer"))
    last = seen[-1].columns
    assert not any(column.waiting or column.withdrawn for column in last) and any(column.waited for column in last)
    stops = [(board, number) for board in seen for number, column in enumerate(board.columns) if column.waiting]
    assert stops
    for board, number in stops:
        column, done = board.columns[number], last[number]
        assert column.draft == "" and column.blocks[-1].waits > 0 and not column.blocks[-1].stands
        assert done.text.startswith(column.text + column.blocks[-1].text)
    for column in last:
        assert [block.round for block in column.blocks] == list(range(len(column.blocks)))
        assert {block.attempt for block in column.blocks} <= {0} and all(block.reading for block in column.blocks)


def test_columns_fill_at_the_same_time(boards):
    lengths = [[len(column.text + column.draft) for column in board.columns] for board in boards if board.columns]
    assert len(lengths) > 3
    middle = lengths[len(lengths) // 2]
    assert all(0 < now < last for now, last in zip(middle, lengths[-1], strict=True))
    assert any(column.draft for board in boards for column in board.columns)


def test_the_outline_of_an_answer_can_be_edited_and_sent_back(loaded, boards):
    assert outline_of(boards[-1]) == OUTLINE


def test_comparing_writes_again_without_the_bus(loaded):
    with_notes, without = list(answer(loaded, dataclasses.replace(WISH, max_new_tokens=12, compare=True)))[-1]
    assert (with_notes.label, without.label) == ("With notes", "Without notes")
    assert any(block.reading["notes"] for column in with_notes.columns for block in column.blocks)
    assert not any(block.reading["notes"] for column in without.columns for block in column.blocks)
    assert [column.text for column in with_notes.columns] != [column.text for column in without.columns]


def test_who_stops_looking_stops_the_call(loaded):
    before = threading.active_count()
    growing = decode(loaded, dataclasses.replace(WISH, max_new_tokens=200, calls_per_second=20), "Answer")
    while not next(growing).columns:
        pass
    growing.close()
    assert threading.active_count() == before
    assert not any(site._forward_pre_hooks for site in loaded.model.stack.snc)


def test_a_call_waits_for_the_one_that_is_being_stopped(loaded, boards):
    slow = decode(loaded, dataclasses.replace(WISH, max_new_tokens=200, calls_per_second=20), "Answer")
    while not next(slow).columns:
        pass
    seen: list = []
    wish = dataclasses.replace(WISH, interventions=("random_gate:0.3",))
    waiting = threading.Thread(target=lambda: seen.extend(decode(loaded, wish, "Answer")))
    waiting.start()
    waiting.join(timeout=1)
    assert waiting.is_alive() and not any(board.columns for board in seen)
    slow.close()
    waiting.join(timeout=120)
    assert [column.text for column in seen[-1].columns] == [column.text for column in boards[-1].columns]


def test_errors_of_a_call_reach_the_reader(loaded):
    with pytest.raises(ValueError, match=r"streams must be in \[0, 2\], got \(7,\)"):
        list(decode(loaded, dataclasses.replace(WISH, interventions=("stale@7",)), "Answer"))


def test_the_shelf_holds_one_model_and_names_what_is_missing(loaded, model_folder, tmp_path):
    shelf = ModelShelf()
    with pytest.raises(ValueError, match="Name a folder or a Hub repository"):
        shelf.get("  ")
    first = shelf.get(f" {model_folder} ")
    assert shelf.get(str(model_folder)) is first and first.untrained == ()
    with pytest.raises(OSError, match=f"{tmp_path} could not be loaded"):
        shelf.get(str(tmp_path))
