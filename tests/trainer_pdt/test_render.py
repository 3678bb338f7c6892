"""The renderer: layout without and with a chat template, pieces that can be tokenized one by one."""

from datetime import datetime

import pytest
import transformers.utils.chat_template_utils as chat_template_utils

from trainer_pdt.data.schema import Document, PlanItem, Stream
from trainer_pdt.features import FeatureMaker
from trainer_pdt.render import (
    render_header,
    render_outline_lines,
    render_prompt,
    render_request,
    render_row,
    render_sequential,
)
from trainer_pdt.trunk_corpus import train_tokenizer

DOCUMENT = Document(
    "d",
    "town",
    ("core",),
    "Describe Velmar.",
    (PlanItem("s0/main crop", "main crop", 0), PlanItem("s0/b", "orchard", 0), PlanItem("s1/c", "river", 1)),
    (Stream(0, "Farming", "", "Oats grow."), Stream(1, "Places", "", "A river.")),
)
PROMPT = "Describe Velmar.\n1. Farming: main crop; orchard\n2. Places: river\n\n"
# The form of GPT-OSS: a system message with the date, then turns of role, channel and message.
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
HARMONY = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\n"
    "# Valid channels: analysis, commentary, final.<|end|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(600, num_documents=100)


def test_plain_layout():
    assert render_prompt(DOCUMENT) == PROMPT
    assert render_header("Farming") == "## Farming\n"
    assert "".join(piece.text for piece in render_row(DOCUMENT, 1)) == PROMPT + "## Places\nA river."


def test_sequential_order():
    text = "".join(piece.text for piece in render_sequential(DOCUMENT, [1, 0]))
    assert text == PROMPT + "## Places\nA river.## Farming\nOats grow."
    assert [piece.kind for piece in render_sequential(DOCUMENT)] == ["request", "outline"] + ["header", "section"] * 2


def test_pieces_tokenize_as_the_whole(tokenizer):
    for stream in (0, 1):
        pieces = render_row(DOCUMENT, stream, tokenizer)
        apart = [token for piece in pieces for token in tokenizer.encode(piece.text)]
        assert apart == tokenizer.encode("".join(piece.text for piece in pieces))
        assert tokenizer.decode(apart) == "".join(piece.text for piece in pieces)


def test_chat_template_keeps_the_answer_in_the_assistant_turn(tokenizer):
    template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    request = render_request("Describe Velmar.", tokenizer)
    assert request == "<|start|>user<|message|>Describe Velmar.<|end|><|start|>assistant<|channel|>final<|message|>"
    assert render_prompt(DOCUMENT, tokenizer).startswith(request + "1. Farming")
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert render_request("Describe Velmar.", tokenizer).endswith("<|end|><assistant>")


@pytest.fixture
def harmony(tokenizer):
    """A tokenizer with the special tokens and the chat template of GPT-OSS, and its end of turn."""
    copy = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<|return|>",
        additional_special_tokens=list(HARMONY_TOKENS),
    )
    copy.chat_template = HARMONY
    return copy


def test_harmony_opens_the_assistants_turn_on_the_final_channel(harmony):
    ids = harmony.encode(render_request("Describe Velmar.", harmony), add_special_tokens=False)
    marks = [token for token in harmony.convert_ids_to_tokens(ids) if token in HARMONY_TOKENS]
    turn = ["<|start|>", "<|message|>", "<|end|>"]
    assert marks == [*turn, *turn, "<|start|>", "<|channel|>", "<|message|>"]
    assert harmony.decode(ids).endswith("<|start|>assistant<|channel|>final<|message|>")


def test_a_harmony_row_is_its_pieces_and_ends_with_the_end_of_turn(harmony):
    features = FeatureMaker(harmony, 4, 32, "salt")(DOCUMENT)
    row = features["request_ids"] + features["outline_ids"] + features["header_ids"][1]
    text = render_prompt(DOCUMENT, harmony) + render_header("Places")
    assert row == harmony.encode(text, add_special_tokens=False)
    assert harmony.decode(features["clean"]["section_ids"][1]) == "A river.<|return|>"


def test_a_row_is_the_same_on_every_day(harmony, monkeypatch):
    # The template of GPT-OSS writes the current date: a run that went on after midnight saw other rows.
    days = []
    for day in (1, 2):
        clock = type("Clock", (), {"now": staticmethod(lambda day=day: datetime(2030, 1, day))})
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        days.append(render_request("Describe Velmar.", harmony))
    assert days[0] == days[1]
    assert "Current date: 2025-08-05\n#" in days[0]
    harmony.chat_template = "{% macro system() %}{{ strftime_now('%d %b %Y, %B') }}{% endmacro %}{{ system() }}"
    assert render_request("Describe Velmar.", harmony) == "05 Aug 2025, August"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`request` is empty"):
        render_request("  ")
    with pytest.raises(ValueError, match="`items` has 1 entries, must be 2"):
        render_outline_lines(["a", "b"], [["x"]])
