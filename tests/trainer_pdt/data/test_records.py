"""Plans and notes are checked, clamped and compared; noisy notes are wrong in the same way in every field."""

from dataclasses import replace

import pytest

from trainer_pdt.data.noisy_notes import collect_objects, noisy_notes
from trainer_pdt.data.notes import dependencies, snapshots, source_of
from trainer_pdt.data.options import NotesOptions, PlanOptions, SplitOptions
from trainer_pdt.data.plans import checked_plan, plan_from_row, plan_row
from trainer_pdt.data.quality import check_quality
from trainer_pdt.data.quality_report import audit_markdown
from trainer_pdt.data.records import build_document
from trainer_pdt.data.schema import Coverage, Entity, Fact, PlanItem, Span
from trainer_pdt.data.teachers import Plan, Rejection, SectionNotes, SourceDocument, StreamPlan
from trainer_pdt.data.worlds import generate_documents
from trainer_pdt.data.worlds_teacher import ProceduralTeacher, world_sources

FIRST = "Ana Varga runs the mill. The mill stands at Velmar since 1852."
SECOND = "Visitors ask for Varga. The mill of 1852 is open all year."
SOURCE = SourceDocument("doc", "notes", "Mill", (("Owner", FIRST), ("Visits", SECOND)))
ITEMS = (
    PlanItem("s0/owner", "who runs it", 0),
    PlanItem("s0/year", "how old it is", 0),
    PlanItem("s1/hours", "when it is open", 1),
)
SECOND_START = len(FIRST) + 2
SECOND_END = SECOND_START + len(SECOND)
PLAN = Plan(
    "Describe the mill.",
    ITEMS,
    (
        StreamPlan("Owner", "Who", 0, len(FIRST)),
        StreamPlan("Visits", "When", SECOND_START, SECOND_END),
    ),
)
ANA = Entity("e1", "Ana Varga", "person", ("Varga",))
MILL = Entity("e0", "The mill", "place", ("the mill",))


def span(text, value, kind, cue, item_id, owner=0):
    start = text.index(value)
    return Span(start, start + len(value), kind, cue, value, item_id, owner)


def fact(text, predicate, value, subject="e0"):
    start = text.index(value)
    return Fact(subject, predicate, value, start, start + len(value))


NOTES = (
    SectionNotes(
        (MILL, ANA),
        (fact(FIRST, "owner", "Ana Varga"), fact(FIRST, "year", "1852")),
        (span(FIRST, "Ana Varga", "own", "owner", "s0/owner"), span(FIRST, "1852", "own", "year", "s0/year")),
    ),
    SectionNotes(
        (ANA, MILL),
        (fact(SECOND, "year", "1852"),),
        (span(SECOND, "1852", "sibling", "year", "s0/year"),),
        (Coverage("s1/hours", "covered"),),
    ),
)


def build(sections=NOTES, **options):
    return build_document(SOURCE, PLAN, sections, NotesOptions(**options))


def test_a_document_of_a_plan_and_notes():
    document = build(round_words=5)
    first, second = document.streams
    assert (first.text, second.text) == (FIRST, SECOND)
    assert first.notes.text == "owner: Ana Varga; year: 1852"
    assert [(e.item_id, e.status, e.provenance) for e in first.notes.coverage] == [
        ("s0/owner", "covered", "confirmed"),
        ("s0/year", "covered", "confirmed"),
    ]
    assert [(s.snapshot_id, s.end, len(s.notes.facts)) for s in first.snapshots] == [
        (0, 0, 0),
        (1, 24, 1),
        (2, 50, 1),
        (3, 62, 2),
    ]
    assert first.snapshots[0].notes.text == "planned: who runs it; how old it is"
    assert not first.snapshots[0].notes.entities
    assert [[e.status for e in s.notes.coverage] for s in second.snapshots] == [
        ["missing"],
        ["missing"],
        ["missing"],
        ["covered"],
    ]
    assert second.ready == (False,)
    assert source_of(document.streams, 1, second.spans[0]) == (0, 1)
    assert [(stream, second.text[a:b], s.value, ready) for stream, (a, b), s, ready in dependencies(document)] == [
        (1, "The mill of 1852 is open all year.", "1852", False)
    ]


def test_an_item_that_nobody_judged_is_a_hint():
    sections = (NOTES[0], replace(NOTES[1], coverage=()))
    assert build(sections).streams[1].notes.coverage == (Coverage("s1/hours", "missing", "hint"),)


def test_long_sections_keep_few_snapshots():
    text = "word " * 1000
    found = snapshots(text.strip(), (), SectionNotes(), round_words=9, max_snapshots=10)
    assert [entry.snapshot_id for entry in found] == [0, 12, 23, 34, 45, 56, 68, 79, 90, 101, 112]
    assert found[-1].end == len(text.strip())


def changed(number, **changes):
    return tuple(replace(n, **changes) if place == number else n for place, n in enumerate(NOTES))


BAD_NOTES = [
    (NOTES[:1], "section_count"),
    (changed(0, entities=(MILL, MILL)), "doubled_entity"),
    (changed(1, entities=(replace(ANA, name="Anna"), MILL)), "ambiguous_entity"),
    (changed(0, entities=(replace(MILL, name=""), ANA)), "empty_entity"),
    (changed(0, spans=(replace(NOTES[0].spans[0], end=5),)), "bad_span"),
    (changed(0, spans=NOTES[0].spans[::-1]), "bad_span"),
    (changed(0, spans=(replace(NOTES[0].spans[0], item_id="s0/other"),)), "span_without_item"),
    (changed(0, spans=(replace(NOTES[0].spans[0], owner=1),)), "span_without_item"),
    (changed(1, spans=(replace(NOTES[1].spans[0], kind="own"),)), "bad_span_kind"),
    (changed(0, facts=(replace(NOTES[0].facts[0], subj_id="e9"),)), "unknown_entity"),
    (changed(0, facts=(replace(NOTES[0].facts[0], object=""),)), "empty_fact"),
    (changed(0, facts=(replace(NOTES[0].facts[0], end=900),)), "bad_evidence"),
    (changed(0, facts=(replace(NOTES[0].facts[0], certainty=1.5),)), "bad_certainty"),
    (changed(1, coverage=(Coverage("s1/hours", "complete"),)), "unknown_status"),
    (changed(1, coverage=(Coverage("s0/year", "covered"),)), "bad_coverage"),
    (changed(1, coverage=(Coverage("s1/hours", "covered"),) * 2), "bad_coverage"),
]


@pytest.mark.parametrize(("sections", "reason"), BAD_NOTES, ids=[reason for _, reason in BAD_NOTES])
def test_notes_that_break_the_schema_are_rejected(sections, reason):
    with pytest.raises(Rejection, match=reason):
        build(sections)


def test_a_plan_that_holds_a_value_is_rejected():
    plan = replace(PLAN, items=(ITEMS[0], replace(ITEMS[1], text="since 1852"), ITEMS[2]))
    with pytest.raises(Rejection, match="plan_holds_value"):
        build_document(SOURCE, plan, NOTES, NotesOptions())


def test_plans_are_clamped():
    first, second = PLAN.streams
    wide = (replace(first, start=-20, end=SECOND_START), replace(second, end=500))
    plan, clashes = checked_plan(replace(PLAN, streams=wide), SOURCE, PlanOptions())
    assert (plan.streams, clashes) == (PLAN.streams, 0)
    assert plan_from_row(plan_row("doc", plan)) == plan


BAD_PLANS = [
    ({"streams": PLAN.streams[:1]}, "stream_count"),
    ({"prompt": " "}, "empty_prompt"),
    ({"streams": (replace(PLAN.streams[0], header=" "), PLAN.streams[1])}, "bad_header"),
    ({"streams": (PLAN.streams[0], replace(PLAN.streams[1], end=900))}, "range_outside"),
    ({"streams": (PLAN.streams[0], replace(PLAN.streams[1], start=5, end=5))}, "range_outside"),
    ({"streams": (replace(PLAN.streams[0], start=62, end=64), PLAN.streams[1])}, "empty_section"),
    ({"streams": (PLAN.streams[0], replace(PLAN.streams[1], start=30))}, "overlapping_sections"),
    ({"items": (*ITEMS[:2], replace(ITEMS[2], text=""))}, "empty_item"),
    ({"items": (*ITEMS, replace(ITEMS[2], stream=2))}, "unknown_stream"),
    ({"items": (*ITEMS, replace(ITEMS[2], item_id="hours"))}, "bad_item_id"),
    ({"items": (*ITEMS, ITEMS[2])}, "doubled_item"),
    ({"items": ITEMS[:2]}, "stream_without_items"),
    ({"items": (*ITEMS, PlanItem("s1/who", "Who runs it", 1))}, "streams_plan_the_same"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_PLANS, ids=[reason for _, reason in BAD_PLANS])
def test_bad_plans_are_rejected(changes, reason):
    with pytest.raises(Rejection, match=reason):
        checked_plan(replace(PLAN, **changes), SOURCE, PlanOptions())


def test_lint_can_warn_or_look_away():
    plan = replace(PLAN, items=(*ITEMS, PlanItem("s1/who", "Who runs it", 1)))
    assert checked_plan(plan, SOURCE, PlanOptions("warn"))[1] == 1
    assert checked_plan(plan, SOURCE, PlanOptions("ignore"))[1] == 0


POOL = {"owner": ("Ana Varga", "Jon Bell"), "year": ("1801", "1852")}


def noisy(**options):
    choice = {"noisy_paraphrase": 0.0, "noisy_drop": 0.0, "noisy_hallucinate": 0.0, "noisy_shuffle": False}
    return noisy_notes(build(), POOL, NotesOptions(**{**choice, **options}))[0]


def test_no_noise_is_the_truth():
    assert noisy() == (build().streams[0].notes,) * 3


def test_lost_facts():
    (variant,) = noisy(noisy_drop=1.0, noisy_variants=1)
    assert variant.facts == () and variant.text == "planned: who runs it; how old it is"
    assert variant.entities == ()


def test_made_up_facts_show_everywhere():
    (variant,) = noisy(noisy_hallucinate=1.0, noisy_variants=1)
    assert [(f.object, f.certainty) for f in variant.facts] == [("Jon Bell", 0.5), ("1801", 0.5)]
    assert variant.text == "owner: Jon Bell; year: 1801"
    assert [(e.name, e.type) for e in variant.entities] == [("The mill", "place"), ("Jon Bell", "person")]


def test_other_words_show_everywhere():
    (variant,) = noisy(noisy_paraphrase=1.0, noisy_variants=1)
    assert variant.text == "who runs it: Varga; how old it is: 1852"
    assert [(e.name, e.aliases) for e in variant.entities] == [("The mill", ("the mill",)), ("Varga", ("Ana Varga",))]


def test_rates_and_independence_of_draws():
    documents = list(generate_documents("train", 0, 120))
    pool = collect_objects(documents)
    options = NotesOptions(noisy_paraphrase=0.0, noisy_drop=0.2, noisy_hallucinate=0.1)
    made = [noisy_notes(document, pool, options) for document in documents]
    pairs = [
        (stream.notes, variant)
        for document, noise in zip(documents, made, strict=True)
        for stream, variants in zip(document.streams, noise, strict=True)
        for variant in variants
    ]
    facts = sum(len(true.facts) for true, _ in pairs)
    assert abs(1 - sum(len(variant.facts) for _, variant in pairs) / facts - 0.2) < 0.03
    assert abs(sum(fact.certainty < 1 for _, v in pairs for fact in v.facts) / (0.8 * facts) - 0.1) < 0.03
    assert noisy_notes(documents[7], pool, options) == made[7]
    assert all(fact.object in variant.text for _, variant in pairs for fact in variant.facts)
    more = [noisy_notes(d, pool, replace(options, noisy_hallucinate=0.0)) for d in documents[:5]]
    for noise, other in zip(made, more, strict=False):
        for variants, calm in zip(noise, other, strict=True):
            for variant, quiet in zip(variants, calm, strict=True):
                assert [f.predicate for f in variant.facts] == [f.predicate for f in quiet.facts]


@pytest.mark.parametrize(
    ("document", "options", "reason"),
    [
        (build(), {"min_section_words": 30}, "short_section"),
        (
            replace(build(), streams=(build().streams[0], replace(build().streams[1], text=50 * "w "))),
            {},
            "unbalanced",
        ),
        (build((NOTES[0], replace(NOTES[1], coverage=()))), {"min_stated_items": 0.9}, "plan_not_followed"),
        (
            replace(
                build(),
                streams=(
                    build().streams[0],
                    replace(build().streams[1], spans=(replace(build().streams[1].spans[0], value="1853"),)),
                ),
            ),
            {},
            "contradiction",
        ),
        (replace(build(), items=ITEMS[:2]), {}, "coverage_catalogue"),
    ],
)
def test_quality_checks(document, options, reason):
    check_quality(build(), SplitOptions())
    with pytest.raises(Rejection, match=reason):
        check_quality(document, SplitOptions(**options))


def test_procedural_teacher_refuses_other_documents():
    (source,) = world_sources(1)
    teacher = ProceduralTeacher()
    assert teacher.plan(source).prompt == source.prompt
    for provenance in ("", "[]", '{"world_split": "train"}', source.provenance.replace('"index": 0', '"index": 1')):
        with pytest.raises(Rejection, match="not_procedural"):
            teacher.plan(replace(source, provenance=provenance))


def test_the_audit_page_shows_text_as_text():
    document = replace(build(), prompt="<script>\n# Title\n`x`")
    page = audit_markdown(document)
    assert "Request: &lt;script> # Title 'x'" in page and FIRST in page and "- year = 1852 (sibling, stream 0)" in page


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NotesOptions(noisy_drop=1.5), "`noisy_drop` is 1.5, must be 0 to 1"),
        (lambda: SplitOptions(0.7, 0.5), "`test_fraction` is 0.5"),
        (lambda: NotesOptions(round_words=0), "`round_words` is 0, must be >= 1"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
