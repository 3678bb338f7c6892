"""`trunk.generate(custom_generate=repo)`: the adapters' answer, and the same trunk afterwards."""

import pytest

pytestmark = pytest.mark.slow
LEFT_AS_IT_WAS = {
    **{"same_tensors": True, "same_names": True, "same_modules": True, "same_plain": True},
    **{"learns": True, "peft": False},
}


@pytest.mark.parametrize("package", [False, True])
def test_a_plain_trunk_decodes_in_parallel(visit, published, package):
    value, _ = visit("generate_on_a_trunk", "owner/pdt", published.case, package=package)
    assert value.pop("tokens") == [True, True]
    assert set(value.pop("kind")) == {"transformers_modules"}
    first, second = value.pop("lent")
    assert first == second, "adapters are kept for the next call"
    assert value == LEFT_AS_IT_WAS


def test_a_revision_and_a_local_folder(visit, published, tmp_path):
    untrained = published.urls["untrained"].rsplit("/", 1)[1]
    value, _ = visit("generate_on_a_trunk", "owner/pdt", published.case, revision=untrained)
    assert value.pop("tokens") == [False, False]
    visit("save_again", "owner/whole", published.case, str(tmp_path / "copy"))
    value, _ = visit("generate_on_a_trunk", str(tmp_path / "copy"), published.case)
    assert value.pop("tokens") == [True, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"layers": 5}, "trunk_num_layers is 3"), ({"num_beams": 2}, "num_beams must be"), ({"colour": 1}, "colour")],
)
def test_what_does_not_fit_is_refused(visit, published, options, words):
    value, _ = visit("error_of", "generate_on_another_trunk", "owner/pdt", published.case, **options)
    assert value["type"] == "ValueError" and words in value["text"]
