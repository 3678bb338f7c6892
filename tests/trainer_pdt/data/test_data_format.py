"""docs/data_format.md: every field and option is described, and its example is what the code makes."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from datasets import List
from transformers import AutoTokenizer

from tests.data_builds import OPTIONS
from tests.trainer_pdt.data.test_records import NOTES, PLAN, SOURCE, build
from trainer_pdt import FeatureMaker, PDTDataCollator
from trainer_pdt.data.options import PlanOptions
from trainer_pdt.data.plans import PLAN_FEATURES, checked_plan, plan_row
from trainer_pdt.data.preflight import PREFLIGHT_FEATURES
from trainer_pdt.data.publish import DOCUMENT_FEATURES
from trainer_pdt.data.sources import SOURCES, Columns
from trainer_pdt.data.splits import SPLIT_FEATURES
from trainer_pdt.parser import RecipeParser

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/data_format.md").read_text(encoding="utf-8")
COLUMNS = ("label", "stream", "write_round", "read_round", "own", "reference", "source_round")


def names(feature):
    """Names of a column and of all that is nested in it."""
    if isinstance(feature, List):
        return names(feature.feature)
    if isinstance(feature, dict):
        return set(feature) | {name for inner in feature.values() for name in names(inner)}
    return set()


@pytest.mark.parametrize(
    "wanted",
    [
        *(names(dict(found)) for found in (PREFLIGHT_FEATURES, PLAN_FEATURES, DOCUMENT_FEATURES, SPLIT_FEATURES)),
        *({field.name for field in fields(kind)} for kind in (*OPTIONS, Columns)),
        set(SOURCES),
        {field.name for kind in SOURCES.values() for field in fields(kind)},
    ],
)
def test_every_field_is_described(wanted):
    assert wanted
    assert not {name for name in wanted if f"`{name}`" not in TEXT}


def test_every_reason_is_described():
    source = "".join(
        path.read_text()
        for path in (ROOT / "trainer_pdt/data").glob("*.py")
        if path.stem in ("sources", "preflight", "plans", "records", "quality", "splits")
    )
    reasons = set(re.findall(r'(?:Reject\([^"]*?|Rejection\(|return )"([a-z]+(?:_[a-z0-9]+)+)"', source))
    assert len(reasons) > 30
    assert not {reason for reason in reasons if f"`{reason}`" not in TEXT}


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


def example_batch():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/tiny/trunk")
    document = build(NOTES, round_words=5)
    features = FeatureMaker(tokenizer, 8, 512, "parallel-decoder-v1", corruption_rate=0.0)(document)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return tokenizer, PDTDataCollator(pad, 12, 16, 3, padding_side="right")([features])


def example_row(tokenizer, batch):
    """The row of stream 1 from its header on, one line per token."""
    keys = ("labels", "stream_ids", "write_round", "read_round", "own_mask", "reference", "source_round")
    lines = ["| token | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for place in range(int(batch["attention_mask"][1].sum())):
        if batch["stream_ids"][1, place] >= 0:
            token = json.dumps(tokenizer.decode([int(batch["input_ids"][1, place])]))
            values = [int(batch[key][1, place]) for key in keys]
            lines.append(f"| `{token}` | " + " | ".join(str(value) for value in values) + " |")
    return "\n".join(lines)


def test_the_example_is_what_the_code_makes():
    row, plan, stream = (json.loads(block) for block in blocks("json"))
    assert [(part["header"], part["text"]) for part in row["sections"]] == list(SOURCE.sections)
    assert plan == json.loads(json.dumps(plan_row(row["id"], checked_plan(PLAN, SOURCE, PlanOptions())[0])))
    made = json.loads(json.dumps(asdict(build(NOTES, round_words=5).streams[1])))
    assert stream == {key: made[key] for key in made if key not in ("noisy_notes", "snapshots")}
    tokenizer, batch = example_batch()
    assert example_row(tokenizer, batch) in TEXT
    assert f"`{json.dumps(batch['coverage_targets'].int().tolist()[0])}`" in TEXT
    assert not batch["coverage_mask"][1].any()


def test_the_recipe_names_fields_only():
    options = RecipeParser(*OPTIONS).parse(["--config", str(ROOT / "recipes/tiny/data.yaml")])
    assert options[0].teacher == "procedural" and options[1].shard_size == 125
