"""Features: token places of values, where facts come from, planted contradictions, notes as tokens."""

import pickle
import random
from dataclasses import replace

import pytest
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerFast

from tests.tiny_training import make_features, make_maker, tokenizer, value_pool
from trainer_pdt.arguments import DataArguments
from trainer_pdt.data.notes import source_of
from trainer_pdt.data.publish import documents_to_dataset
from trainer_pdt.data.worlds import WorldOptions, generate_document, generate_documents
from trainer_pdt.features import WorldFeatures, load_features, plant_contradictions
from trainer_pdt.render import render_prompt
from trainer_pdt.variants import FACT_FORMAT

DOCUMENTS = list(generate_documents("train", 0, 40)) + list(generate_documents("train", 0, 10, hard=True))


def test_shares_of_kinds_are_spread_and_cross():
    dataset = WorldFeatures("train", 40, make_maker(), WorldOptions(), hard_fraction=0.5, foreign_fraction=0.25)
    tags = [dataset.document(index).split_tags for index in range(len(dataset))]
    for start in range(0, 40, 8):
        part = tags[start : start + 8]
        assert sum("hard" in tag for tag in part) == 4 and sum("foreign_values" in tag for tag in part) == 2
        assert sum("hard" in tag and "foreign_values" in tag for tag in part) == 1
    assert dataset.document(0) == generate_document("train", 0, WorldOptions())


def test_foreign_values_are_for_training_alone():
    data = DataArguments(train_documents=10, eval_documents=10, foreign_fraction=0.5, document_streams=3)
    train, validation = load_features(data, make_maker(), seed=0)
    assert sum("foreign_values" in train.document(index).split_tags for index in range(10)) == 5
    assert not any("foreign_values" in validation.document(index).split_tags for index in range(10))


def decode(ids):
    return tokenizer().decode(ids)


def test_tokens_are_the_rendered_row():
    for document in DOCUMENTS[:5]:
        features = make_maker()(document)
        assert decode(features["request_ids"] + features["outline_ids"]) == render_prompt(document)
        for stream, ids in zip(document.streams, features["clean"]["section_ids"], strict=True):
            assert ids[-1] == tokenizer().eos_token_id
            assert decode(ids[:-1]) == stream.text


def test_marked_tokens_spell_the_values():
    for document in DOCUMENTS:
        view = make_maker()(document)["clean"]
        for stream in document.streams:
            ids, reference = view["section_ids"][stream.stream_id], view["reference"][stream.stream_id]
            siblings = [span for span in stream.spans if span.kind == "sibling"]
            assert max(reference) + 1 == len(siblings)
            for number, span in enumerate(siblings):
                text = decode([token for token, r in zip(ids, reference, strict=True) if r == number])
                assert span.value in text
                assert len(text) <= len(span.value) + 2
            own = "".join(decode([t]) for t, o in zip(ids, view["own"][stream.stream_id], strict=True) if o)
            assert all(span.value in own for span in stream.spans if span.kind == "own")


def test_sources_hold_the_same_value():
    linked = 0
    for document in DOCUMENTS:
        for stream in document.streams:
            for span in stream.spans:
                if span.kind == "sibling":
                    place = source_of(document.streams, stream.stream_id, span)
                    assert place is not None
                    assert place[0] != stream.stream_id
                    assert document.streams[place[0]].spans[place[1]].value == span.value
                    linked += span.owner == stream.stream_id
    assert linked


def test_source_token_ends_the_first_statement():
    document = DOCUMENTS[3]
    view = make_maker()(document)["clean"]
    for stream in document.streams:
        siblings = [span for span in stream.spans if span.kind == "sibling"]
        for number, span in enumerate(siblings):
            source, token = (
                view["source_stream"][stream.stream_id][number],
                view["source_token"][stream.stream_id][number],
            )
            assert decode(view["section_ids"][source][: token + 1]).endswith(span.value)


def test_an_owner_is_told_what_a_sibling_says_of_its_fact():
    places = 0
    for document in DOCUMENTS:
        view = make_maker()(document)["clean"]
        for stream in document.streams:
            ids, told = view["section_ids"][stream.stream_id], view["told_token"][stream.stream_id]
            owned = {span.item_id: span.value for span in stream.spans if span.kind == "own"}
            said = {
                (value, min(where))
                for item, value in owned.items()
                if (where := [place for other in document.streams for place in said_at(view, document, other, item)])
            }
            spelled = "".join(decode([token]) for token, place in zip(ids, told, strict=True) if place >= 0)
            assert all(value in spelled for value, _ in said)
            assert {place for place in told if place >= 0} == {place for _, place in said}
            places += len(said)
    assert places


def said_at(view, document, stream, item):
    """Last tokens of the stream's spans that repeat another stream's item with the value of its owner."""
    reference = view["reference"][stream.stream_id]
    siblings = [span for span in stream.spans if span.kind == "sibling"]
    for number, span in enumerate(siblings):
        owner = document.streams[span.owner]
        first = next((own for own in owner.spans if own.kind == "own" and own.item_id == item), None)
        if span.item_id == item and span.owner != stream.stream_id and first and first.value == span.value:
            yield max(token for token, mark in enumerate(reference) if mark == number)


def test_a_contradicting_sibling_tells_an_owner_nothing():
    document = next(d for d in DOCUMENTS if any(s.kind == "sibling" for stream in d.streams for s in stream.spans))
    planted, chosen = plant_contradictions(document, value_pool(), 1.0, random.Random(0))
    view = make_maker().view(planted, document, chosen, 0.5)
    assert chosen and not any(place >= 0 for told in view["told_token"] for place in told)


def test_only_the_owners_first_statement_is_told():
    document = next(d for d in DOCUMENTS if any(t >= 0 for s in make_maker()(d)["clean"]["told_token"] for t in s))
    told = make_maker()(document)["clean"]["told_token"]
    number = next(number for number, places in enumerate(told) if max(places) >= 0)
    stream = document.streams[number]
    again = [
        replace(span, start=span.start + len(stream.text) + 1, end=span.end + len(stream.text) + 1)
        for span in stream.spans
        if span.kind == "own"
    ]
    twice = replace(stream, text=f"{stream.text} {stream.text}", spans=(*stream.spans, *again))
    streams = [twice if index == number else other for index, other in enumerate(document.streams)]
    view = make_maker()(replace(document, streams=tuple(streams)))["clean"]
    assert [place for place in view["told_token"][number] if place >= 0] == [
        place for place in told[number] if place >= 0
    ]


def test_kept_features_are_of_this_release(monkeypatch):
    maker = make_maker()
    before = Hasher.hash(maker)
    maker(DOCUMENTS[0])
    assert Hasher.hash(maker) == before == Hasher.hash(pickle.loads(pickle.dumps(maker)))
    monkeypatch.setattr("trainer_pdt.features.FEATURE_LAYOUT", 0)
    assert Hasher.hash(maker) != before


def test_item_tokens_and_slots():
    for document in DOCUMENTS:
        features = make_maker()(document)
        spans = {
            (s.stream_id, span.item_id) for s in document.streams for span in s.spans if span.owner == s.stream_id
        }
        for item, token in zip(document.items, features["clean"]["item_token"], strict=True):
            assert (token >= 0) == ((item.stream, item.item_id) in spans)
        assert len(features["plan_slots"]) == 8
        count = min(8, len(document.items))
        assert all(0 < slot < 32 for slot in features["plan_slots"][:count])
        assert not any(features["plan_slots"][count:])


def test_planted_values_differ_and_keep_their_places():
    for document in DOCUMENTS:
        changed, planted = plant_contradictions(document, value_pool(), 0.5, random.Random(1))
        assert planted
        for before, after in zip(document.streams, changed.streams, strict=True):
            for number, (old, new) in enumerate(zip(before.spans, after.spans, strict=True)):
                assert after.text[new.start : new.end] == new.value
                is_planted = (before.stream_id, number) in planted
                assert (old.value != new.value) == is_planted
                assert not is_planted or new.value in value_pool()[new.cue]
    assert plant_contradictions(DOCUMENTS[0], value_pool(), 0.0, random.Random(1)) == (DOCUMENTS[0], set())


def test_corrupted_view_marks_what_contradicts():
    seen = 0
    for document in DOCUMENTS:
        features = make_maker()(document)
        assert not any(any(flags) for flags in features["clean"]["contradicts"] + features["clean"]["planted"])
        for stream in document.streams:
            view, number = features["corrupted"], stream.stream_id
            reference, planted = view["reference"][number], view["planted"][number]
            for token, mark in enumerate(planted):
                if mark and view["source_token"][number][reference[token]] >= 0:
                    assert view["contradicts"][number][reference[token]]
                    seen += 1
    assert seen


def test_notes_are_the_stated_facts_and_noisy_ones_differ():
    differs = 0
    for document in DOCUMENTS:
        view = make_maker()(document)["clean"]
        for stream in document.streams:
            facts = [decode(ids) for ids in view["fact_ids"][stream.stream_id]]
            assert facts == [FACT_FORMAT.format(cue=span.cue, value=span.value) for span in stream.spans]
            differs += view["noisy_ids"][stream.stream_id] != view["fact_ids"][stream.stream_id]
    assert differs > len(DOCUMENTS)


def test_dataset_rows_give_the_same_features_and_can_be_mapped():
    rows = documents_to_dataset(DOCUMENTS[:3])
    maker = make_maker()
    mapped = rows.map(maker, remove_columns=rows.column_names)
    for document, row in zip(DOCUMENTS[:3], mapped, strict=True):
        assert maker(document) == row


def test_features_are_a_function_of_the_document():
    assert make_features(3)[1] == make_features(3)[1]
    assert make_features(3)[1] != make_features(3)[2]
    with pytest.raises(IndexError, match="index is 3"):
        make_features(3)[3]


def test_documents_of_two_to_six_streams():
    for streams in range(2, 7):
        features = make_maker()(generate_document("train", 0, WorldOptions(streams)))
        assert len(features["header_ids"]) == len(features["clean"]["section_ids"]) == streams


def test_tokenizer_without_eos_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="eos_token_id is None"):
        make_maker().__class__(bare, 8, 32, "salt")
