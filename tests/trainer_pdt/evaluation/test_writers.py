"""Writing documents here and in worker processes: the same texts."""

from contextlib import closing

import pytest

from modeling_pdt.trace import MEASURED
from tests.tiny_training import make_model, tokenizer
from trainer_pdt.data.counting import StreamText
from trainer_pdt.data.worlds import generate_documents
from trainer_pdt.evaluation.modes import PARALLEL_MODES, Written, twin_prompts, write_parallel, write_swapped
from trainer_pdt.evaluation.writers import Writers


def test_joined_keeps_the_order():
    parts = [Written([[StreamText(name)]], [[name]], [[{"kind": name}]]) for name in "abc"]
    joined = Written.joined(parts)
    assert [streams[0].text for streams in joined.texts] == list("abc")
    assert joined.results == [["a"], ["b"], ["c"]]
    assert [events[0]["kind"] for events in joined.events] == list("abc")


def decisions(written):
    """Events without what a clock says, and apart from them their fractions: the same to rounding in any process."""
    fractions = []

    def whole(value):
        if isinstance(value, float):
            return fractions.append(value)
        if isinstance(value, dict):
            return {key: whole(entry) for key, entry in value.items() if key not in MEASURED}
        return [whole(entry) for entry in value] if isinstance(value, list | tuple) else value

    return whole(written.events), fractions


@pytest.mark.slow
def test_workers_write_what_this_process_writes(tmp_path):
    model, words, folder = make_model().eval(), tokenizer(), tmp_path / "model"
    model.save_pretrained(folder, include_trunk=True)
    words.save_pretrained(folder)
    documents = [*generate_documents("test", 0, 7, with_notes=False)]
    documents = [document for document in documents if document.domain == documents[0].domain] * 3
    pairs = list(zip(documents, twin_prompts(documents, words), strict=True))
    options = {"batch_size": 2, "seed": 3, "agreement_threshold": None, "max_new_tokens": 20}
    written = {}
    for workers in (1, 2):
        writers = Writers(model, words, str(folder), workers, threads=2)
        with closing(writers):
            plain = writers(write_parallel, documents, **options)
            zeroed = writers(write_parallel, documents, interventions=PARALLEL_MODES["zero_notes"](), **options)
            written[workers] = [plain, zeroed, *writers(write_swapped, pairs, **options)]
    for here, there in zip(written[1], written[2], strict=True):
        assert len(here.texts) == len(documents)
        (events, fractions), (others, near) = decisions(here), decisions(there)
        assert (here.texts, events) == (there.texts, others)
        assert fractions == pytest.approx(near, abs=1e-6)
        assert [[r.token_ids for r in row] for row in here.results] == [
            [r.token_ids for r in row] for row in there.results
        ]
    assert written[1][0].texts != written[1][1].texts
