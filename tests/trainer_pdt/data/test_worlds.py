"""The worlds: determinism, splits, plan limits, held-out parts, twins, notes, and the parser's exactness."""

import random
from collections import Counter
from functools import cache

import pytest

from trainer_pdt.data.notes import readiness, word_round
from trainer_pdt.data.worlds import (
    SPLITS,
    WorldOptions,
    chance_by_cue,
    fact_values,
    generate_document,
    generate_documents,
    with_foreign_values,
)
from trainer_pdt.data.worlds_lexicon import (
    CUES,
    DOMAINS,
    GIVEN_NAMES,
    NUM_HELDOUT_VALUES,
    PERSON,
    POOLS,
    SURNAMES,
    section_of,
    values_of,
    wordings_of,
)
from trainer_pdt.data.worlds_notes import CORRUPTIONS, corrupt
from trainer_pdt.data.worlds_parser import parse_section

HELDOUT = {word for pool in (*POOLS.values(), GIVEN_NAMES, SURNAMES) for word in pool[-NUM_HELDOUT_VALUES:]}

KINDS = [
    {},
    {"hard": True},
    {"num_streams": 2},
    {"num_streams": 6},
    {"num_streams": 5, "hard": True},
    {"heldout_values": True, "heldout_wordings": True},
]


@cache
def make_document(split: str, index: int, **options):
    return generate_document(split, index, WorldOptions(**options))


def documents(count: int, split: str = "train", **options):
    """The first documents of a split; each is made once for all tests."""
    return [make_document(split, index, **options) for index in range(count)]


def test_foreign_values_leave_only_the_cue_to_tell_facts_apart():
    typed = stated = linked = 0
    for hard in (False, True):
        for document in documents(40, hard=hard, foreign_values=True):
            assert "foreign_values" in document.split_tags and parse_all(document) == stated_all(document)
            values = {}
            for stream in document.streams:
                for span in stream.spans:
                    values.setdefault(span.cue, set()).add(span.value)
                    # Linked facts are chosen by their owners, as all others are.
                    assert span.hops == 1 and (span.kind == "own") is (span.owner == stream.stream_id)
                    typed += span.value in values_of(span.cue)
                    stated += 1
                    assert HELDOUT.isdisjoint(span.value.split())
            assert all(len(said) == 1 for said in values.values())
            assert len(set.union(*values.values())) == len(values)
            linked += any(CUES[cue].source for cue in values)
            for stream in document.streams:
                assert {fact.object for fact in stream.notes.facts} == {span.value for span in stream.spans}
    assert typed < 0.15 * stated and linked > 3


def test_foreign_values_may_leave_links_as_they_are():
    kept = 0
    for document in documents(40):
        said = fact_values(with_foreign_values(document, random.Random(0)))
        links = [cue for cue in said if CUES[cue].source in said]
        assert all(said[cue] == said[CUES[cue].source] for cue in links)
        kept += len(links)
    assert kept > 3


def test_a_foreign_twin_has_another_value_for_every_fact():
    for index in range(20):
        options = WorldOptions(foreign_values=True)
        pair = [fact_values(generate_document("train", index, options, values_variant=twin)) for twin in (0, 1)]
        assert pair[0].keys() == pair[1].keys() and all(pair[0][cue] != pair[1][cue] for cue in pair[0])


def stated_all(document):
    return [[(span.cue, span.value) for span in stream.spans] for stream in document.streams]


def parse_all(document):
    return [[(mention.cue, mention.value) for mention in parse_section(stream.text)] for stream in document.streams]


def test_lexicon_is_consistent():
    words = [word for pool in (*POOLS.values(), GIVEN_NAMES, SURNAMES) for word in pool]
    assert len(words) == len(set(words))
    for domain in DOMAINS:
        types = [CUES[cue].value_type for section in domain.sections for cue in section.core]
        assert len(types) == len(set(types)) == 12
        for section in domain.sections:
            assert all(cue in CUES for cue in (*section.core, section.hard, section.linked) if cue)
    for cue in CUES.values():
        assert not any(cue.name != other and cue.name in other for other in CUES), (
            "a cue inside another misleads parsing"
        )
        if cue.source:
            assert CUES[cue.source].value_type == cue.value_type


def test_unknown_heading_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'Nothing'.*Farming"):
        section_of("Nothing")


@pytest.mark.parametrize("options", KINDS)
def test_parser_finds_exactly_the_spans(options):
    for document in documents(200, **options):
        for stream in document.streams:
            found = [
                (mention.cue, mention.value, mention.start, mention.end) for mention in parse_section(stream.text)
            ]
            assert found == [(span.cue, span.value, span.start, span.end) for span in stream.spans]


def test_parser_reads_model_text():
    text = (
        "The main crop zeppelins. and the chief farmer Anna Barlow is old. The nearby river Arvo flows. The flag color"
    )
    found = [(mention.cue, mention.value) for mention in parse_section(text)]
    assert found == [("main crop", "zeppelins"), ("chief farmer", "Anna Barlow"), ("nearby river", "Arvo")]
    assert parse_section("The main crop, they say. The flag color. Red.") == []


@pytest.mark.parametrize("options", [*KINDS, {"foreign_values": True}])
def test_same_seed_same_document(options):
    assert list(generate_documents("train", 0, 20, **options)) == documents(20, **options)
    assert make_document("train", 3, **options) != generate_document("train", 3, WorldOptions(**options, seed=1))


def test_splits_differ_in_ids_and_texts():
    texts, ids = {}, set()
    for split in SPLITS:
        for document in documents(100, split):
            key = tuple(stream.text for stream in document.streams)
            assert texts.setdefault(key, split) == split
            ids.add(document.document_id)
    assert len(ids) == 100 * len(SPLITS)


@pytest.mark.parametrize("options", KINDS)
def test_plan_limits(options):
    num_streams = options.get("num_streams", 3)
    for document in documents(200, **options):
        assert len(document.streams) == num_streams
        assert [stream.stream_id for stream in document.streams] == list(range(num_streams))
        assert len(document.items) <= 2 * num_streams + 2
        for stream in document.streams:
            owned = [item for item in document.items if item.stream == stream.stream_id]
            assert 2 <= len(owned) <= 3
            assert 1 <= sum(span.kind == "sibling" and span.owner != stream.stream_id for span in stream.spans) <= 3
            assert any(span.kind == "own" for span in stream.spans)
            assert len(stream.ready) == sum(span.kind == "sibling" for span in stream.spans)


def test_about_one_item_in_eight_is_not_stated():
    planned = stated = 0
    for document in documents(600):
        planned += len(document.items)
        stated += len({span.item_id for stream in document.streams for span in stream.spans})
    assert 0.85 < stated / planned < 0.93


def test_core_has_one_fact_per_type_and_hard_has_several():
    for document in documents(300):
        own = [CUES[item.item_id.split("/")[1]] for item in document.items]
        types = [cue.value_type for cue in own if cue.source is None]
        assert len(types) == len(set(types))
    for document in documents(300, hard=True):
        types = [CUES[item.item_id.split("/")[1]].value_type for item in document.items]
        assert max(types.count(kind) for kind in (PERSON, "year")) > 1


def test_two_hop_documents_repeat_the_source():
    linked = 0
    for document in documents(600):
        values = fact_values(document)
        spans = [span for stream in document.streams for span in stream.spans if CUES[span.cue].source]
        linked += bool(spans)
        for span in spans:
            assert span.value == values[CUES[span.cue].source]
            assert span.kind == "sibling"
        if spans:
            assert {span.hops for span in spans} == {1, 2}
    assert 0.18 < linked / 600 < 0.32


@pytest.mark.parametrize("heldout", [False, True])
def test_heldout_parts_are_kept_apart(heldout):
    for hard in (False, True):
        for document in documents(150, hard=hard, heldout_values=heldout, heldout_wordings=heldout):
            for cue, value in fact_values(document).items():
                assert value in values_of(cue, heldout)
                assert value not in values_of(cue, not heldout)
            for item in document.items:
                assert item.text in wordings_of(item.item_id.split("/")[1], heldout)


def test_prompt_and_plan_hold_no_value():
    for document in documents(200, hard=True):
        plan = " ".join([document.prompt, *(item.text for item in document.items)]).split()
        assert not set(fact_values(document).values()) & set(plan)


def test_twin_has_the_same_plan_and_other_values():
    for hard in (False, True):
        options = WorldOptions(hard=hard)
        for index in range(100):
            first, twin = (generate_document("test", index, options, values_variant=variant) for variant in (0, 1))
            assert first.items == twin.items and first.prompt == twin.prompt
            assert fact_values(first).keys() == fact_values(twin).keys()
            assert all(value != fact_values(twin)[cue] for cue, value in fact_values(first).items())


def test_chance_is_one_over_the_pool():
    chance = chance_by_cue()
    assert chance["main crop"] == pytest.approx(1 / 16)
    assert chance["chief farmer"] == pytest.approx(1 / 256)
    assert chance_by_cue(heldout_values=True)["main crop"] == pytest.approx(1 / 4)


@pytest.mark.parametrize("heldout", [False, None])
def test_chance_is_how_often_two_documents_state_the_same_value(heldout):
    stated = {}
    for document in documents(500, "test", heldout_values=heldout):
        for cue, value in fact_values(document).items():
            stated.setdefault(cue, Counter())[value] += 1
    chance = chance_by_cue(heldout)
    same = sum(count * (count - 1) for values in stated.values() for count in values.values())
    sizes = {cue: values.total() * (values.total() - 1) for cue, values in stated.items()}
    assert same / sum(sizes.values()) == pytest.approx(
        sum(chance[cue] * size for cue, size in sizes.items()) / sum(sizes.values()), rel=0.08
    )


def test_most_references_are_ready_and_some_are_not():
    ready = [label for document in documents(400) for stream in document.streams for label in stream.ready]
    assert 0.7 < sum(ready) / len(ready) < 0.92


def test_readiness_follows_the_round_length():
    document = documents(1)[0]
    everything_in_one_round = [readiness(document.streams, stream, round_words=10_000) for stream in document.streams]
    assert not any(any(labels) for labels in everything_in_one_round)
    assert word_round("one two three four", 8, round_words=2) == 1


def test_snapshots_grow_to_the_full_notes():
    for document in documents(50):
        for stream in document.streams:
            assert stream.snapshots[0].end == 0 and not stream.snapshots[0].notes.facts
            assert stream.snapshots[0].notes.text.startswith("planned: ")
            assert stream.snapshots[-1].notes == stream.notes
            counts = [len(snapshot.notes.facts) for snapshot in stream.snapshots]
            assert counts == sorted(counts)
            assert [snapshot.snapshot_id for snapshot in stream.snapshots] == list(range(len(counts)))


def test_coverage_says_what_is_stated():
    for document in documents(50):
        for stream in document.streams:
            stated = {span.item_id for span in stream.spans}
            for entry in stream.notes.coverage:
                assert entry.status == ("covered" if entry.item_id in stated else "missing")


def test_corruptions_change_facts_and_text_together():
    rng = random.Random(0)
    for document in documents(50, hard=True):
        notes = document.streams[0].notes
        by_kind = {kind: corrupt(notes, kind, rng) for kind in CORRUPTIONS}
        assert len(by_kind["drop"].facts) == len(notes.facts) - 1
        assert len(by_kind["hallucinate"].facts) == len(notes.facts) + 1
        assert sum(a != b for a, b in zip(notes.facts, by_kind["swap"].facts, strict=True)) == 1
        for noisy in by_kind.values():
            assert all(fact.object in noisy.text for fact in noisy.facts)
            names = {entity.name for entity in noisy.entities if entity.type == PERSON}
            assert names == {fact.object for fact in noisy.facts if CUES[fact.predicate].value_type == PERSON}
        assert len(document.streams[0].noisy_notes) == len(CORRUPTIONS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WorldOptions(num_streams=7), "`num_streams` is 7, must be 2 to 6"),
        (lambda: generate_document("dev", 0, WorldOptions()), "`split` is 'dev', must be one of train"),
        (lambda: generate_document("train", -1, WorldOptions()), "must be >= 0"),
        (lambda: corrupt(documents(1)[0].streams[0].notes, "lose", random.Random(0)), "`kind` is 'lose'"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
