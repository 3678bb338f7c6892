"""Plan contracts and the sentinel of an outline."""

import pytest
import torch

from modeling_pdt.plan import PlanEntry, StreamPlan, parse_outline, read_contract
from trainer_pdt.data.schema import Document, PlanItem, Stream

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
CONTRACT = {
    "document_id": "velmar",
    "items": [
        {"item_id": "s0/crop", "text": "main crop", "stream": 0},
        {"item_id": "s1", "text": "mayor", "stream": 1},
    ],
    "streams": [{"stream_id": 0, "header": "Farming", "text": "..."}, {"stream_id": 1, "header": "People"}],
}


class Letters:
    """A tokenizer of one token per letter."""

    def __call__(self, text, **kwargs):
        texts = [text] if isinstance(text, str) else text
        ids = [[2 + ord(letter) % 90 for letter in one] for one in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def generate(model, **kwargs):
    return model.generate(
        IDS, tokenizer=Letters(), num_streams=2, max_new_tokens=6, return_dict_in_generate=True, **kwargs
    )


def test_a_contract_is_its_items_and_headers(make_model):
    model = make_model("llama", trained=True)
    output = generate(model, plan_contract=CONTRACT)
    items = [{"text": "main crop", "stream": 0}, {"text": "mayor", "stream": 1}]
    written = generate(model, plan_texts=items, stream_prefixes=["## Farming\n", "## People\n"])
    assert torch.equal(output.sequences, written.sequences)
    assert output.trace.settings["plan"] == "contract" and written.trace.settings["plan"] == "external"
    headers = [event["headers"] for event in output.trace.of_kind("plan")]
    assert headers == [event["headers"] for event in written.trace.of_kind("plan")]
    other = {**CONTRACT, "items": CONTRACT["items"][:1]}
    assert not torch.equal(generate(model, plan_contract=[CONTRACT, other]).sequences[2:], output.sequences[2:])
    own = generate(model, plan_contract=CONTRACT, stream_prefixes=["a", "b"])
    assert own.trace.of_kind("plan")[0]["headers"] == [[2 + 97 % 90], [2 + 98 % 90]]


def test_a_document_of_the_dataset_is_a_contract():
    item, stream = PlanItem("s0/mayor", "mayor", 0), Stream(0, "People", "", "The mayor is Ona.")
    document = Document("d", "worlds", (), "Describe.", (item,), (stream,)).to_dict()
    assert read_contract(document, 1) == ([PlanEntry("mayor", 0)], ["People"])
    assert read_contract({"items": document["items"]}, 3) == ([PlanEntry("mayor", 0)], [])


def test_contracts_that_do_not_fit_are_refused(make_model):
    model = make_model("llama")
    for choices, message in (
        ({"plan_contract": {"streams": []}}, "plan_contract must hold items"),
        (
            {"plan_contract": {**CONTRACT, "streams": CONTRACT["streams"][:1]}},
            "streams must hold num_streams=2 headers",
        ),
        ({"plan_contract": [CONTRACT]}, r"one per prompt \(2\), got 1"),
        ({"plan_contract": CONTRACT, "plan_texts": []}, "at most one of plan_texts and plan_contract"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, **choices)


def test_an_outline_ends_at_its_sentinel():
    text = "1. Farming: main crop\n2. People: mayor; founder</plan>\n3. Not: this"
    assert parse_outline(text) == [StreamPlan("Farming", ("main crop",)), StreamPlan("People", ("mayor", "founder"))]
