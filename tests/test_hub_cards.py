"""The card templates render, keep what they are given and leave out lines whose value is missing."""

import copy
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hub_cards import TEMPLATES, template_path
from tests.tiny_training import tokenizer as make_tokenizer
from trainer_pdt.publishing import prompt_facts
from trainer_pdt.render import render_request


def render(**values):
    return ModelCard.from_template(ModelCardData(), template_path=template_path("model_card.md"), **values)


def test_templates_exist():
    assert all(template_path(name).is_file() for name in TEMPLATES)
    with pytest.raises(ValueError, match="name = 'other'"):
        template_path("other")


def test_full_card():
    metric = {"name": "sibling-fact recall", "value": 0.71, "low": 0.66, "high": 0.76, "n": 412}
    card = render(
        base_model="openai/gpt-oss-20b",
        repo_id="someone/pdt",
        tags=["gpt-oss"],
        datasets=["someone/worlds"],
        num_streams=3,
        block_size=12,
        metrics=[metric],
        temperature=1.0,
        seed=0,
        packages={"torch": "2.13.0"},
        limits=["English only."],
    )
    assert card.data.base_model == "openai/gpt-oss-20b"
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["someone/worlds"]
    assert "gpt-oss" in card.data.tags
    for part in (
        'from_pretrained("someone/pdt", trust_remote_code=True)',
        "| streams trained with | 3 |",
        "| sibling-fact recall | 0.71 | 0.66 to 0.76 | 412 |",
        "| seed | `0` |",
        "- English only.",
    ):
        assert part in card.content
    assert "undefined" not in card.content
    assert "None" not in card.content


def test_missing_values_leave_no_lines():
    card = render(num_streams=None, metrics=[{"name": "recall", "value": None}], packages=None, seed=None)
    for part in ("## Facts", "## Measured", "## Training", "base_model", "datasets", "None", "| |"):
        assert part not in card.content
    front = yaml.safe_load(card.content.split("---")[1])
    assert front["library_name"] == "transformers"


@pytest.mark.parametrize("opening", [None, "<assistant>", "<|start|>assistant"])
def test_the_code_makes_the_prompt_that_was_trained_on(opening):
    tokenizer = make_tokenizer()
    if opening is not None:
        template = "{% for turn in messages %}<user>{{ turn.content }}{% endfor %}"
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = f"{template}{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    request = 'Describe Velmar\'s "old" town in three parts.'
    content = render(**prompt_facts({"examples": [{"prompt": request}]}, tokenizer)).content
    (code,) = re.findall(r"^request = .*?(?=^inputs)", content, re.DOTALL | re.MULTILINE)
    values = {"tokenizer": tokenizer}
    exec(code, values)
    assert values["prompt"] == render_request(request, tokenizer)


@pytest.mark.parametrize(("tap", "said"), [("mid", True), ("top", False)])
def test_what_notes_cannot_carry_depends_on_the_tap(tap, said):
    assert ("not what it only read" in render(writer_tap=tap).content) is said


def test_zero_is_a_value():
    card = render(metrics=[{"name": "text CE", "value": 0.0}], bus_lag=0)
    assert "| text CE | 0.0 |  |  |" in card.content
    assert "| lag in rounds | 0 |" in card.content
