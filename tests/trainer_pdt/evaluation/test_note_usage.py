"""Use of notes: shares and right notes by hand, and what a tiny model's readings give."""

import pytest

from tests.trainer_pdt.evaluation.test_benchmark import model, tokenizer  # noqa: F401
from trainer_pdt.evaluation.answer_tables import usage_table
from trainer_pdt.evaluation.documents import held_out_documents
from trainer_pdt.evaluation.modes import write_parallel
from trainer_pdt.evaluation.note_usage import usage_measures


def block(stream, number, *notes, sink=0.25, plan=0.25, gate=0.5):
    read = [{"stream": s, "round": r, "weight": weight} for s, r, weight in notes]
    return {"stream": stream, "round": number, "gate": gate, "sink": sink, "plan": plan, "notes": read}


def fact(stream, number, source, source_round):
    return {"stream": stream, "round": number, "source": source, "source_round": source_round}


def test_measures_by_hand():
    readings = [
        [block(0, 1, (1, 0, 0.3), (2, 0, 0.1)), block(1, 0, sink=0.5, plan=0.5, gate=0.25)],
        [block(0, 2, (1, 0, 0.1), (1, 1, 0.1), (2, 1, 0.2))],
    ]
    references = [[fact(0, 1, 1, 0), fact(1, 0, 0, 0), fact(2, 5, 1, 0)], [fact(0, 2, 2, 1)]]
    found = usage_measures(readings, references)
    assert {name: found[name]["mean"] for name in ("gate", "sink", "plan", "notes")} == pytest.approx(
        {"gate": 1.25 / 3, "sink": 1 / 3, "plan": 1 / 3, "notes": 0.8 / 3}
    )
    # Of the first document only the first fact's source is among what its block saw.
    assert (found["source"]["mean"], found["source"]["n"]) == (pytest.approx((0.75 + 0.5) / 2), 2)
    assert found["source_even"]["mean"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    labels = [row[0] for row in usage_table({"note_usage": found}).rows]
    assert labels[0] == "gate of SNC" and len(labels) == 6
    assert usage_measures([[]], [[]])["source"]["mean"] is None
    with pytest.raises(ValueError, match="references has 1 documents, must have 2, as many as readings"):
        usage_measures(readings, references[:1])


def test_readings_are_kept_by_document(model, tokenizer):  # noqa: F811
    documents = held_out_documents("test", 3, 0)
    options = {"batch_size": 2, "max_new_tokens": 30, "agreement_threshold": None}
    plain = write_parallel(model, tokenizer, documents, **options)
    written = write_parallel(model, tokenizer, documents, record_readings=True, **options)
    assert written.texts == plain.texts and plain.readings == [] and len(written.readings) == 3
    for texts, readings in zip(written.texts, written.readings, strict=True):
        assert {entry["stream"] for entry in readings} == {0, 1, 2}
        for entry in readings:
            assert entry["round"] < len(texts[entry["stream"]].round_ends)
            seen = [(note["stream"], note["round"]) for note in entry["notes"]]
            assert all(stream != entry["stream"] and 0 <= number < entry["round"] for stream, number in seen)
            shares = entry["sink"] + entry["plan"] + sum(note["weight"] for note in entry["notes"])
            assert shares == pytest.approx(1, abs=1e-4)
