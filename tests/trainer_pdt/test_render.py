"""The renderer: layout without and with a chat template, pieces that can be tokenized one by one."""

import pytest

from trainer_pdt.data.schema import Document, PlanItem, Stream
from trainer_pdt.render import (
    render_header,
    render_outline_lines,
    render_prompt,
    render_request,
    render_row,
    render_sequential,
)
from trainer_pdt.trunk import train_tokenizer

DOCUMENT = Document(
    "d",
    "town",
    ("core",),
    "Describe Velmar.",
    (PlanItem("s0/main crop", "main crop", 0), PlanItem("s0/b", "orchard", 0), PlanItem("s1/c", "river", 1)),
    (Stream(0, "Farming", "", "Oats grow."), Stream(1, "Places", "", "A river.")),
)
PROMPT = "Describe Velmar.\n1. Farming: main crop; orchard\n2. Places: river\n\n"


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


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`request` is empty"):
        render_request("  ")
    with pytest.raises(ValueError, match="`items` has 1 entries, must be 2"):
        render_outline_lines(["a", "b"], [["x"]])
