"""Records of the original system: written, read back with plan and notes, refused by field where they are broken."""

import copy
import json
from pathlib import Path

import pytest
from datasets import Dataset

from tests.data_builds import make_builder
from trainer_pdt.data.kd_records import kd_records
from trainer_pdt.data.options import NotesOptions, PlanOptions
from trainer_pdt.data.original_teacher import OriginalTeacher
from trainer_pdt.data.plans import checked_plan
from trainer_pdt.data.records import build_document
from trainer_pdt.data.sources import make_source
from trainer_pdt.data.storage import Reject, read_json
from trainer_pdt.data.teachers import Rejection
from trainer_pdt.data.worlds import WorldOptions, generate_document

TEXT = "Maienfeld lies in Graubünden. It is a small town.\n\nThe Alps stand behind it. Graubünden has many of them."
HALF = TEXT.index("\n\n")


def fact(predicate, value, evidence):
    start = TEXT.index(evidence)
    span = {"start": start, "end": start + len(evidence), "text": evidence}
    return {"subj_id": "E1", "predicate": predicate, "object": value, "evidence_span": span, "certainty": 0.9}


def notes_of(name, facts, wish, status="covered"):
    """Notes schema 2.0; both streams number their entities from E1."""
    entity = {"id": "E1", "name": "Maienfeld", "type": "town", "aliases": ["the town"], "canonical": "Maienfeld"}
    coverage = [{"plan_item_id": f"COVER::{wish}::{status}", "status": status}]
    return {"stream_id": name, "ENT": [entity], "FACT": facts, "COVERAGE": coverage}


NOTES = [
    notes_of("stream_1", [fact("located_in", "Graubünden", "Maienfeld lies in Graubünden")], "Identify the canton"),
    notes_of("stream_2", [fact("near", "Alps", "The Alps stand behind it"), fact("is", "red", "Alps")], "Name hills"),
]


def planned(notes):
    places = ((0, HALF), (HALF + 2, len(TEXT) + 100))
    wishes = (("Place", "Identify the canton"), ("Landscape", "Name hills"))
    return [
        {
            "stream_id": f"stream_{number}",
            "header": header,
            "summary": f"On the {header.lower()}",
            notes: [wish],
            "section_contract": {"type": "source_slice", "start_idx": start, "end_idx": end},
        }
        for number, ((header, wish), (start, end)) in enumerate(zip(wishes, places, strict=True), 1)
    ]


def parquet_row():
    plan = {"streams": planned("notes_contract"), "input_text": TEXT, "prompt": "Tell of the town."}
    notes = json.dumps(NOTES)
    return {"sample_id": "survey_1", "domain": "survey", "plan_text": json.dumps(plan), "notes_true": notes}


def kd_record(stream=1):
    return {
        "example_id": f"survey_1:stream_{stream}",
        "sample_id": "survey_1",
        "stream_id": f"stream_{stream}",
        "domain": "survey",
        "split": "validation",
        "student_ids": [101, 7],
        "notes_teacher": [[0.5, 0.25]],
        "metadata": {
            "document_text": TEXT,
            "document_paragraphs": TEXT.split("\n\n"),
            "teacher_plan": {"plan": planned("notes")},
            "coverage_provenance": {"method": "notes_json", "strength": "hint", "confirmed": False},
        },
        "true_notes": NOTES,
    }


def rows_of(folder, records, kind="original_kd", **fields):
    file = folder / f"rows.{'jsonl' if kind == 'original_kd' else 'parquet'}"
    if kind == "original_kd":
        file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    else:
        Dataset.from_list(records).to_parquet(str(file))
    source = make_source({"kind": kind, "files": [str(file)], "name": "old", **fields})
    return list(source.rows(1_000_000, folder))


def taught(source, options=PlanOptions()):  # noqa: B008
    """The published document of a source."""
    teacher = OriginalTeacher()
    plan, _ = checked_plan(teacher.plan(source), source, options)
    return build_document(source, plan, teacher.notes(source, plan), NotesOptions())


@pytest.mark.parametrize("kind", ["original_kd", "original_parquet"])
def test_plan_and_notes_come_through(tmp_path, kind):
    records = [kd_record(1), kd_record(2)] if kind == "original_kd" else [parquet_row()]
    (source,) = rows_of(tmp_path, records, kind)
    assert (source.document_id, source.domain) == ("survey_1", "survey")
    assert (
        (source.split, source.prompt) == ("validation", None) if kind == "original_kd" else (None, "Tell of the town.")
    )
    document = taught(source)
    assert [(stream.header, stream.text) for stream in document.streams] == [
        ("Place", TEXT[:HALF]),
        ("Landscape", TEXT[HALF + 2 :]),
    ]
    assert [(item.item_id, item.stream) for item in document.items] == [
        ("s0/note 1", 0),
        ("s0/located in of Maienfeld", 0),
        ("s1/note 1", 1),
        ("s1/near of Maienfeld", 1),
    ]
    told = [(s.kind, s.value, s.owner) for stream in document.streams for s in stream.spans]
    # "red" is in no section.
    assert told == [("own", "Graubünden", 0), ("own", "Alps", 1), ("sibling", "Graubünden", 0)]
    notes = [stream.notes for stream in document.streams]
    assert [(f.subj_id, f.predicate, f.object) for f in notes[1].facts] == [
        ("e0", "near", "Alps"),
        ("e0", "located_in", "Graubünden"),
    ]
    assert notes[0].facts[0].certainty == 0.9 and notes[0].entities[0].aliases == ("the town",)
    assert [(c.item_id, c.status, c.provenance) for c in notes[0].coverage] == [
        ("s0/note 1", "covered", "hint"),
        ("s0/located in of Maienfeld", "covered", "confirmed"),
    ]


def test_segments_of_paragraphs_do_where_there_are_no_slices(tmp_path):
    record = kd_record()
    plan = record["metadata"]["teacher_plan"]
    for entry in plan["plan"]:
        del entry["section_contract"]
    plan["segments"] = [{"stream": f"stream_{n + 1}", "paragraph_start": n, "paragraph_end": n + 1} for n in range(2)]
    (source,) = rows_of(tmp_path, [record])
    assert [text for _, text in source.sections] == TEXT.split("\n\n")


def changed(path, value):
    record = copy.deepcopy(kd_record())
    *way, last = path
    place = record
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return record


CONTRACT = ("metadata", "teacher_plan", "plan", 0, "section_contract")


@pytest.mark.parametrize(
    ("path", "value", "reason", "detail"),
    [
        (("sample_id",), None, "missing_field", "sample_id is missing"),
        (("sample_id",), 7, "bad_record", "sample_id is int, must be str"),
        (("sample_id",), "survey_1_aug2", "augmented_copy", "would leak"),
        (("split",), "dev", "bad_record", "split is 'dev', must be one of train, validation, test"),
        (("metadata", "document_text"), 1, "bad_record", "metadata.document_text is int"),
        (("metadata", "teacher_plan", "plan", 0, "notes"), [""], "bad_record", r"plan\[0\].notes\[0\] is ''"),
        (CONTRACT, None, "missing_field", r"plan\[0\].section_contract is missing"),
        ((*CONTRACT, "end_idx"), 5000, "range_outside", "0 to 5000 of"),
        ((*CONTRACT, "end_idx"), True, "bad_record", "end_idx is bool, must be int"),
        (("true_notes",), NOTES[:1], "bad_record", "has 1 entries, must have 2"),
        (("true_notes", 1, "FACT", 0, "evidence_span"), None, "missing_field", r"true_notes\[1\].FACT\[0\].evidence"),
        (("true_notes", 0, "ENT", 0, "name"), ["x"], "bad_record", r"true_notes\[0\].ENT\[0\].name is list"),
        (("true_notes", 0, "COVERAGE"), ["x"], "bad_record", r"COVERAGE\[0\] is str, must be an object"),
        (("metadata", "document_text"), TEXT + "\ud800", "invalid_utf8", "surrogates"),
    ],
)
def test_a_broken_record_is_rejected_by_field(tmp_path, path, value, reason, detail):
    (reject,) = rows_of(tmp_path, [changed(path, value)])
    assert isinstance(reject, Reject) and reject.reason == reason
    with pytest.raises(AssertionError, match=detail):
        raise AssertionError(reject.detail)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [("plan_text", "{", "invalid_json"), ("notes_true", "{}", "bad_record"), ("plan_text", "{}", "missing_field")],
)
def test_a_broken_row_is_rejected(tmp_path, column, value, reason):
    row = {**parquet_row(), column: value, "x_text": TEXT}
    assert [reject.reason for reject in rows_of(tmp_path, [row], "original_parquet")] == [reason]


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("true_notes", 0, "COVERAGE", 0, "status"), "complete", "unknown_status"),
        (("true_notes", 0, "FACT", 0, "subj_id"), "E9", "unknown_entity"),
        (("true_notes", 1, "FACT", 0, "certainty"), 1.5, "bad_certainty"),
    ],
)
def test_notes_that_break_the_schema_reject_the_document(tmp_path, path, value, reason):
    (source,) = rows_of(tmp_path, [changed(path, value)])
    with pytest.raises(Rejection, match=reason):
        taught(source)


def test_records_of_one_sample_that_disagree_are_no_copies(tmp_path):
    other = {**kd_record(2), "true_notes": NOTES[::-1]}
    first, second = rows_of(tmp_path, [kd_record(1), other])
    assert first != second and first.document_id == second.document_id


def test_a_document_written_as_records_keeps_its_facts(tmp_path):
    documents = [generate_document("train", number, WorldOptions(streams)) for number, streams in ((0, 2), (1, 4))]
    records = [record for document in documents for record in kd_records(document, "train")]
    assert not [name for name in records[0] if "ids" in name]
    for document, source in zip(documents, rows_of(tmp_path, records), strict=True):
        read = taught(source)
        assert read.document_id == document.document_id
        assert [(s.header, s.summary, s.text) for s in read.streams] == [
            (s.header, s.summary, s.text) for s in document.streams
        ]
        for stream, twin in zip(read.streams, document.streams, strict=True):
            assert {(s.start, s.value) for s in stream.spans} <= {(s.start, s.value) for s in twin.spans}
        repeated = [s.value for stream in read.streams for s in stream.spans if s.kind == "sibling"]
        assert repeated
        assert {c.provenance for stream in read.streams for c in stream.notes.coverage} == {"confirmed"}


@pytest.mark.slow
def test_a_dataset_is_built_from_records(tmp_path):
    first = make_builder(tmp_path / "first", save_kd_jsonl=True).run()
    files = [str(tmp_path / "first" / "dataset_kd" / "*.jsonl")]
    sources = [{"kind": "original_kd", "files": files, "name": "old"}]
    again = make_builder(tmp_path / "again", sources=sources, teacher="original").run()
    rows = [read_json(Path(folder) / "manifest.json")["rows"] for folder in (first, again)]
    assert rows[0] == rows[1]
