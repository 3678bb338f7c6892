"""What notes change in given text: measures by hand, what is on the bus, and the section on a tiny model."""

from types import SimpleNamespace

import pytest
import torch

from tests.trainer_pdt.evaluation.test_benchmark import model, tokenizer  # noqa: F401
from trainer_pdt.evaluation import given_text
from trainer_pdt.evaluation.answer_plots import plot_dependency
from trainer_pdt.evaluation.answer_tables import dependency_table
from trainer_pdt.evaluation.arguments import EvaluationArguments
from trainer_pdt.evaluation.documents import held_out_documents
from trainer_pdt.evaluation.given_text import CONDITIONS, dependency, dependency_measures, read_documents, text
from trainer_pdt.evaluation.tables import text_table
from trainer_pdt.features import FeatureMaker, collect_values

LOSSES = {"notes": [[1.0, 0.5, 0.5], [2.0]], "no_notes": [[3.0, 0.5, 1.5], [2.5]]}
DEPENDS = [[True, False, False], [True]]


def test_measures_by_hand():
    found = dependency_measures(LOSSES, DEPENDS)
    assert (found["dependency"]["notes"]["mean"], found["dependency"]["notes"]["n"]) == (1.5, 2)
    assert found["dependency"]["no_notes"]["mean"] == 2.75 and found["non_dependency"]["no_notes"]["mean"] == 1.0
    assert found["dependency_gain"]["no_notes"] == {
        **{"mean": 1.25, "low": 0.5, "high": 2.0, "n": 2},
        "clusters": ((2.0, 1), (0.5, 1)),
    }
    assert found["non_dependency_gain"].keys() == {"no_notes"}
    assert found["non_dependency_gain"]["no_notes"]["mean"] == 0.5


def test_losses_have_to_fit_the_tokens():
    with pytest.raises(ValueError, match=r"conditions \['no_notes'\], allowed: 'notes' and others"):
        dependency_measures({"no_notes": LOSSES["no_notes"]}, DEPENDS)
    with pytest.raises(ValueError, match="losses of 'no_notes' must hold one number per token"):
        dependency_measures({**LOSSES, "no_notes": [[1.0], [2.0]]}, DEPENDS)


@pytest.fixture
def evaluation(model, tokenizer):  # noqa: F811
    """A tiny model whose notes matter: its SNC writes something."""
    torch.manual_seed(0)
    for name, parameter in model.pdt_parameters().items():
        if "snc" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    config = model.config
    values = collect_values(held_out_documents("train", 20, 0))
    features = FeatureMaker(tokenizer, config.num_plan_slots, config.plan_vocab_size, config.plan_hash_salt, values)
    arguments = EvaluationArguments(core_documents=3, hard_documents=0)
    documents = held_out_documents("test", 3, 0)
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, features=features, arguments=arguments, documents=documents
    )


def test_section_of_a_tiny_model(evaluation, tmp_path):
    found = dependency(evaluation)
    assert found["dependency"].keys() == {"notes", "trunk", *CONDITIONS}
    means = [found["dependency"][name]["mean"] for name in found["dependency"]]
    assert len(set(means)) == len(means), "every condition changes what dependent tokens are given"
    read = text(evaluation)
    for name, key in (("notes", "pdt"), ("trunk", "trunk")):
        assert found["non_dependency"][name]["mean"] == pytest.approx(read[key], abs=1e-5)
        assert found["non_dependency"][name]["n"] == read["tokens"]
    rows = dependency_table({"dependency_ce": found}).rows
    assert [row[0] for row in rows][:3] == ["notes as written", "true notes", "no notes (bus off)"]
    assert rows[0][2] == "" != rows[1][2]
    assert plot_dependency({"dependency_ce": found}, tmp_path / "a.png").is_file()
    assert plot_dependency({}, tmp_path / "b.png") is None


def test_owners_that_a_sibling_told_are_apart(evaluation):
    before = text(evaluation)
    documents = held_out_documents("test", 60, 0)
    made = [evaluation.features(document)["clean"] for document in documents]
    size = evaluation.model.config.block_size
    # A note is read from the next round on.
    told = [
        sum(t >= 0 and t // size < n // size for s in view["told_token"] for n, t in enumerate(s)) for view in made
    ]
    number = max(range(60), key=told.__getitem__)
    assert told[number]
    evaluation.documents = [documents[number]]
    read = text(evaluation)
    assert read["told"]["tokens"] == told[number] and read["told"]["pdt"] != read["told"]["trunk"]
    assert read["told"]["excess"]["mean"] == pytest.approx(read["told"]["pdt"] - read["told"]["trunk"], abs=1e-5)
    rows = {row[0]: row[1] for row in text_table({"text_ce": read}).rows}
    assert rows["cross-entropy of what a sibling told its owner, trunk (nats)"] == f"{read['told']['trunk']:.3f}"
    evaluation.documents = [documents[told.index(0)]]
    assert text(evaluation).keys() == before.keys() - {"told"}


def test_what_is_on_the_bus(evaluation):
    (read,) = read_documents(evaluation, held_out_documents("test", 3, 0, with_notes=True))
    silent, zeroed, other, true = (
        CONDITIONS[name](read) for name in ("no_notes", "zero_notes", "other_notes", "true_notes")
    )
    assert not silent.keep_RV.any()
    assert torch.equal(zeroed.perturbation_RVKN, -read.output.speculation)
    assert other.donor_R.tolist() == [3, 4, 5, 6, 7, 8, 0, 1, 2]
    assert true.teacher_RV.any()


def test_a_document_alone_has_no_other_ones_notes(evaluation, monkeypatch):
    monkeypatch.setattr(given_text, "DOCUMENTS_AT_ONCE", 2)
    whole = dependency(evaluation)
    evaluation.arguments.core_documents = 2
    assert dependency(evaluation) == whole


def test_the_divergence_where_a_sibling_told_the_owner_has_a_row_of_its_own():
    parts = {"divergence": {"mean": 0.25}, "told": {"divergence": {"mean": 0.75}}}
    rows = {row[0]: row[1] for row in text_table({"text_ce": parts}).rows}
    assert rows["KL from the trunk on other tokens (nats)"] == "0.250"
    assert rows["KL from the trunk where a sibling told the owner (nats)"] == "0.750"
