"""Ways of writing documents, on a tiny random trunk with the tokenizer of the tiny recipe."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, GptOssForCausalLM, LogitsProcessor

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.bus import NotesBus
from modeling_pdt.interventions import Ablate
from trainer_pdt.data.worlds import generate_documents
from trainer_pdt.evaluation import modes
from trainer_pdt.evaluation.modes import (
    PARALLEL_MODES,
    batches,
    continue_rows,
    notes_as_text,
    plan_entries,
    section_text,
    twin_prompts,
    write_full_text,
    write_parallel,
    write_random_gate,
    write_sequential,
    write_swapped,
)
from trainer_pdt.evaluation.suite import Evaluation
from trainer_pdt.render import render_header, render_outline, render_prompt, render_request
from trainer_pdt.trunk import TrunkArguments, trunk_config

TRUNK = Path(__file__).parents[3] / "recipes/tiny/trunk"
BLOCK, TOKENS = 4, 10


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TRUNK)


@pytest.fixture
def model(tokenizer):
    """Random weights large enough for every note to move what is sampled; an agreement head that may judge."""
    sizes = TrunkArguments(
        hidden_size=32, num_layers=3, num_kv_heads=2, head_dim=8, intermediate_size=32, initializer_range=0.1
    )
    model = PDTForParallelDecoding.from_trunk(
        GptOssForCausalLM(trunk_config(sizes, tokenizer)),
        notes_dim=16,
        notes_per_block=2,
        adapter_bottleneck=4,
        block_size=BLOCK,
        trained_parts=["snc", "agreement", "coverage"],
    )
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def documents():
    """Four documents of two streams, the first two and the last two of one domain each."""
    by_domain = {}
    for document in generate_documents("test", 0, 40, num_streams=2, with_notes=False):
        by_domain.setdefault(document.domain, []).append(document)
    return [document for group in list(by_domain.values())[:2] for document in group[:2]]


@pytest.fixture
def calls(model, monkeypatch):
    """What `generate` was called with: `(input_ids, keyword arguments)`."""
    recorded, generate = [], model.generate

    def spy(input_ids, **options):
        recorded.append((input_ids, options))
        return generate(input_ids, **options)

    monkeypatch.setattr(model, "generate", spy)
    return recorded


class StopsEarly(LogitsProcessor):
    """Ends a section at places that depend on its text."""

    def __init__(self, eos):
        self.eos = eos

    def __call__(self, input_ids, scores):
        stops = input_ids.sum(dim=1) % 4 == 0
        scores = scores.clone()
        scores[stops] = float("-inf")
        scores[stops, self.eos] = 0.0
        return scores


def texts_of(written):
    return [[section.text for section in sections] for sections in written.texts]


def contexts(tokenizer, input_ids, options):
    """Unpadded contexts of one call as text."""
    mask = options["attention_mask"].bool()
    return [tokenizer.decode(row[keep]) for row, keep in zip(input_ids, mask, strict=True)]


def test_section_text_ends_rounds_at_characters_and_drops_eos(tokenizer):
    text = "The raw metal iron comes first."
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    section = section_text(tokenizer, [*tokens, tokenizer.eos_token_id], [(0, 3), (3, len(tokens) + 1)])
    assert section.text == text
    assert section.round_ends == (len(tokenizer.decode(tokens[:3])), len(text))
    assert section.round_of(section.round_ends[0] - 1) == 0
    assert section.round_of(section.round_ends[0]) == 1
    assert section_text(tokenizer, [], []).round_ends == ()


def test_blocks_withdrawn_by_chance_are_others_in_every_batch(model, tokenizer, documents):
    written = write_random_gate(model, tokenizer, documents, rate=0.4, batch_size=1, max_new_tokens=4 * BLOCK)
    places = [
        frozenset((event["stream"], event["round"]) for event in events if event["kind"] == "rollback")
        for events in written.events
    ]
    assert all(places) and len(set(places)) > 1
    again = write_random_gate(model, tokenizer, documents[3:], rate=0.4, batch_size=1, max_new_tokens=4 * BLOCK)
    assert texts_of(again) == texts_of(written)[3:]


def test_batches_keep_every_item_in_order():
    assert batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert batches([], 2) == []


def test_plan_entries_are_the_items(documents):
    entries = plan_entries(documents[0])
    assert [(entry["text"], entry["stream"]) for entry in entries] == [(i.text, i.stream) for i in documents[0].items]


def test_twin_prompts_ask_for_another_subject_over_the_same_outline(tokenizer, documents):
    twins = twin_prompts(documents, tokenizer)
    for twin, document, other in zip(twins, documents, (documents[i] for i in (1, 0, 3, 2)), strict=True):
        assert twin == render_request(other.prompt, tokenizer) + render_outline(document)
        assert twin != render_prompt(document, tokenizer)


def test_twin_prompts_need_two_documents_of_a_domain(tokenizer, documents):
    with pytest.raises(ValueError, match=f"one of domain '{documents[2].domain}', .* more core_documents"):
        twin_prompts(documents[:3], tokenizer)
    # An evaluation of too few wrote all other modes before it said so.
    evaluation = SimpleNamespace(control_documents=documents[:3], tokenizer=tokenizer, write=pytest.fail)
    with pytest.raises(ValueError, match="more core_documents"):
        Evaluation.recall(evaluation)


def test_write_parallel_gives_texts_results_and_events_of_every_document(model, tokenizer, documents):
    written = write_parallel(model, tokenizer, documents[:3], batch_size=2, max_new_tokens=TOKENS)
    assert [len(per) for per in (written.texts, written.results, written.events)] == [3, 3, 3]
    for sections, results, events in zip(written.texts, written.results, written.events, strict=True):
        for stream, (section, result) in enumerate(zip(sections, results, strict=True)):
            assert len(result.token_ids) <= TOKENS
            assert section == section_text(tokenizer, result.token_ids, result.blocks)
            assert section.round_ends[-1] == len(section.text)
            commits = [e for e in events if e["kind"] == "commit" and e["stream"] == stream]
            assert [e["round"] for e in commits] == list(range(len(section.round_ends)))
            assert [(e["start"], e["end"]) for e in commits] == result.blocks


def test_write_parallel_does_not_depend_on_the_batch(model, tokenizer, documents):
    together = write_parallel(model, tokenizer, documents[:2], max_new_tokens=TOKENS)
    apart = write_parallel(model, tokenizer, documents[:2], batch_size=1, max_new_tokens=TOKENS)
    assert texts_of(together) == texts_of(apart)
    other = write_parallel(model, tokenizer, documents[:2], max_new_tokens=TOKENS, seed=1)
    assert texts_of(together) != texts_of(other)


def test_parallel_modes_change_what_is_read(model, tokenizer, documents):
    def write(interventions, **options):
        return texts_of(
            write_parallel(
                model, tokenizer, documents[:2], interventions=interventions, max_new_tokens=3 * BLOCK, **options
            )
        )

    modes = {name: write(make()) for name, make in PARALLEL_MODES.items()}
    for name, texts in modes.items():
        assert name == "pdt" or texts != modes["pdt"], name
    gate_off = write([], gate_scale=0.0)
    assert modes["gate_zero"] == gate_off
    assert write([Ablate(plan=True)]) == gate_off


def test_independent_streams_are_the_trunk(model, tokenizer, documents):
    alone = write_parallel(model, tokenizer, documents[:1], trunk_only=True, max_new_tokens=TOKENS)
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.mul_(-1)
    assert texts_of(write_parallel(model, tokenizer, documents[:1], trunk_only=True, max_new_tokens=TOKENS)) == (
        texts_of(alone)
    )


def test_swapped_pairs_read_each_others_notes(model, tokenizer, documents, monkeypatch):
    reads, window = [], NotesBus.window

    def spy(bus, rows, read_round, lag, sources=None, own_notes=False):
        result = window(bus, rows, read_round, lag, sources, own_notes)
        stored = bus.notes_BSVKN.clone() if bus.notes_BSVKN.shape[2] else None
        reads.append((bus.num_streams, bus.plan_BPN.shape[1], rows, sources, read_round, lag, result, stored))
        return result

    monkeypatch.setattr(NotesBus, "window", spy)
    pairs = list(zip(documents, twin_prompts(documents, tokenizer), strict=True))
    own, other = write_swapped(model, tokenizer, pairs, batch_size=3, max_new_tokens=3 * BLOCK)
    assert [len(own.texts), len(other.texts), len(own.results), len(other.events)] == [4] * 4
    checked = 0
    for streams, plan, rows, sources, read_round, lag, (notes, mask), stored in reads:
        assert torch.equal(sources // streams, (rows // streams) ^ 1)
        assert torch.equal(sources % streams, rows % streams)
        for place in range(len(rows)):
            visible = notes[place, plan:][mask[place, plan:]]
            if len(visible):
                donor, sibling = int(rows[place]) // streams ^ 1, 1 - int(rows[place]) % streams
                newest = int(read_round[place] - lag[place])
                assert torch.equal(visible, stored[donor, sibling, : newest + 1].flatten(0, 1)[: len(visible)])
                checked += 1
    assert checked >= 16


def test_swapped_documents_are_the_documents_and_their_twins(model, tokenizer, documents, calls):
    twins = twin_prompts(documents, tokenizer)
    write_swapped(model, tokenizer, list(zip(documents, twins, strict=True)), batch_size=3, max_new_tokens=BLOCK)
    prompts = [context for ids, options in calls for context in contexts(tokenizer, ids, options)]
    assert prompts[::2] == [render_prompt(document, tokenizer) for document in documents]
    assert prompts[1::2] == twins
    assert [len(ids) for ids, _ in calls] == [2] * 4


def test_sequential_contexts_hold_the_earlier_sections(model, tokenizer, documents, calls):
    stops = StopsEarly(tokenizer.eos_token_id)
    written = write_sequential(
        model, tokenizer, documents[:3], batch_size=2, max_new_tokens=TOKENS, logits_processor=[stops]
    )
    assert [len(ids) for ids, _ in calls] == [2, 2, 1, 1]
    for index, document in enumerate(documents[:3]):
        first, second = calls[index // 2 * 2], calls[index // 2 * 2 + 1]
        prompt, sections = render_prompt(document, tokenizer), written.texts[index]
        assert contexts(tokenizer, *first)[index % 2] == prompt
        expected = prompt + render_header(document.streams[0].header) + sections[0].text + tokenizer.eos_token
        assert contexts(tokenizer, *second)[index % 2] == expected
        assert second[1]["stream_prefixes"][index % 2] == [render_header(document.streams[1].header)]
        assert [section.round_ends for section in sections] == [(), (0,)]
        assert [section.round_of(0) for section in sections] == [0, 1]


def test_full_text_contexts_hold_the_siblings_text_up_to_the_round_before(model, tokenizer, documents, calls):
    stops = StopsEarly(tokenizer.eos_token_id)
    written = write_full_text(
        model, tokenizer, documents[:2], BLOCK, max_new_tokens=3 * BLOCK, logits_processor=[stops]
    )
    assert len(calls) <= 3
    assert len({len(ids) for ids, _ in calls}) > 1, "some rows end earlier than others"
    first = contexts(tokenizer, *calls[0])
    headers = [render_header(stream.header) for stream in documents[0].streams]
    prompt = render_prompt(documents[0], tokenizer)
    assert first[:2] == [prompt + headers[0], prompt + headers[1]]
    second = contexts(tokenizer, *calls[1])
    for index, document in enumerate(documents[:2]):
        parts = [section.text[: section.round_ends[0]] for section in written.texts[index]]
        prompt, headers = render_prompt(document, tokenizer), [render_header(s.header) for s in document.streams]
        for stream, section in enumerate(written.texts[index]):
            if len(section.round_ends) > 1:
                sibling = headers[1 - stream] + parts[1 - stream]
                own = headers[stream] + parts[stream]
                found = [text.replace(tokenizer.eos_token, "") for text in second]
                assert prompt + sibling + own in found


def test_notes_as_text_are_the_facts_of_each_block_and_no_longer_than_notes(tokenizer):
    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    texts = ("The raw metal iron comes first.", " So it is.", " All this recalls the main crop barley.")
    parts, metal, crop = [encode(text) for text in texts], encode(" raw metal iron"), encode(" main crop barley")
    ends = [len(parts[0]), len(parts[0]) + len(parts[1]), sum(map(len, parts))]
    blocks = list(zip([0, *ends], ends, strict=False))
    section = [token for part in parts for token in part]
    assert notes_as_text(tokenizer, section, blocks, 99) == metal + crop
    assert notes_as_text(tokenizer, section, blocks, 1) == [metal[-1], crop[-1]]
    together = encode(" raw metal iron, main crop barley")
    assert notes_as_text(tokenizer, section, [(0, len(section))], 99) == together
    assert notes_as_text(tokenizer, [], [], 4) == []


def test_full_text_with_slots_shows_notes_in_place_of_text(model, tokenizer, documents, calls, monkeypatch):
    told = tokenizer(" raw metal iron", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(modes, "notes_as_text", lambda tokenizer, tokens, blocks, slots: told[-slots:])
    write_full_text(model, tokenizer, documents[:1], BLOCK, max_new_tokens=BLOCK + 2, slots=2)
    prompt, headers = render_prompt(documents[0], tokenizer), [render_header(s.header) for s in documents[0].streams]
    second = contexts(tokenizer, *calls[1])
    assert second[0].startswith(prompt + headers[1] + tokenizer.decode(told[-2:]) + headers[0])


def test_full_text_rounds_are_blocks_and_keep_to_the_limit(model, tokenizer, documents):
    written = write_full_text(model, tokenizer, documents[:2], BLOCK, max_new_tokens=BLOCK + 2)
    assert [len(section.round_ends) for sections in written.texts for section in sections] == [2] * 4
    limited = write_full_text(model, tokenizer, documents[:2], BLOCK, max_new_tokens=BLOCK)
    assert all(len(section.round_ends) == 1 for sections in limited.texts for section in sections)
    for sections, shorter in zip(written.texts, limited.texts, strict=True):
        for section, short in zip(sections, shorter, strict=True):
            assert section.text.startswith(short.text)


def test_full_text_never_asks_for_more_than_is_left(model, tokenizer, documents, calls):
    write_full_text(model, tokenizer, documents[:1], BLOCK, max_new_tokens=BLOCK + 2)
    assert [options["max_new_tokens"] for _, options in calls] == [BLOCK, 2]


@pytest.mark.parametrize(("name", "value"), [("agreement_threshold", 1.0), ("plan", "trunk")])
def test_baselines_ignore_a_saved_gate_and_plan(model, tokenizer, documents, name, value):
    """A calibrated model keeps its threshold in `generation_config`; the bare trunk is never judged by it."""

    def write():
        return [
            texts_of(write_sequential(model, tokenizer, documents[:2], max_new_tokens=TOKENS)),
            texts_of(write_full_text(model, tokenizer, documents[:2], BLOCK, max_new_tokens=TOKENS)),
        ]

    plain = write()
    setattr(model.generation_config, name, value)
    assert write() == plain


def test_continue_rows_does_not_depend_on_padding(model, tokenizer, documents):
    prefixes = [tokenizer(render_prompt(d, tokenizer), add_special_tokens=False)["input_ids"] for d in documents[:2]]
    prefixes[1] = prefixes[1][:-7]
    headers = [render_header("Places")] * 2
    together = continue_rows(model, tokenizer, prefixes, headers, 0, max_new_tokens=6)
    for index in range(2):
        alone = continue_rows(model, tokenizer, prefixes[index : index + 1], headers[:1], 0, max_new_tokens=6)
        assert alone.streams[0][0].token_ids == together.streams[index][0].token_ids
