"""What decoding recipes refuse before they load anything."""

import pytest

from trainer_pdt.baselines.arguments import BaselineArguments
from trainer_pdt.decode_arguments import DecodeArguments
from trainer_pdt.trunk import TrunkArguments


@pytest.mark.parametrize("kind", [DecodeArguments, BaselineArguments])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        # A negative temperature was taken for 0.
        ({"temperature": -1.0}, "temperature=-1.0, allowed: a number at least 0.0"),
        ({"top_p": 2.0, "temperature": 0.0}, "top_p=2.0, allowed: a number above 0.0 and at most 1.0"),
        ({"top_k": -1}, "top_k=-1, allowed: an int of at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0, allowed: an int of at least 1"),
        ({"threads": 0}, "threads=0, allowed: an int of at least 1"),
    ],
)
def test_impossible_sampling_is_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(model="m", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_streams": "x"}, "num_streams must be an integer >= 1, got 'x'"),
        ({"replay_chunk_calls": 0}, "replay_chunk_calls=0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0, allowed: a number above 0.0"),
    ],
)
def test_options_of_decoding_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeArguments(model="m", **options)


def test_shares_of_the_trunk_s_mixture_are_shares():
    with pytest.raises(ValueError, match=r"p_cut=7.0, allowed: a number at least 0.0 and at most 1.0"):
        TrunkArguments(p_cut=7.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # These were ignored without a word.
        ({"token_records": True}, "token_records=True, allowed with manifest=None: False, it is for the manifest"),
        ({"reading_records": True}, "reading_records=True, allowed with manifest=None: False"),
        ({"memory_report": True}, "memory_report=True, allowed with manifest=None: False"),
        ({"reference_notes": "nothere"}, "reference_notes='nothere', allowed with manifest=None: None"),
        # These failed when everything was decoded, without the name of the option.
        ({"manifest": "."}, r"manifest='\.', allowed: a file, it is a folder"),
        ({"stream_jsonl": "."}, r"stream_jsonl='\.', allowed: a file, it is a folder"),
        (
            {"manifest": "m.json", "reference_notes": "nothere"},
            r"reference_notes='nothere', allowed: a YAML or JSON file with a mapping.* No such file",
        ),
        ({"plan_contract": "nothere"}, r"plan_contract='nothere', allowed: .* No such file"),
        ({"seed_notes": "."}, r"seed_notes='\.', allowed: .* Is a directory"),
    ],
)
def test_files_of_a_run_are_checked_before_it(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeArguments(model="m", **options)


def test_a_file_of_reference_notes_is_read_before_the_run(tmp_path):
    file = tmp_path / "notes.yaml"
    file.write_text("stream_0: [barley]\n")
    DecodeArguments(model="m", manifest=str(tmp_path / "m.json"), reference_notes=str(file), token_records=True)
    file.write_text("- barley\n")
    with pytest.raises(ValueError, match=r"reference_notes=.*: the top level must be a mapping"):
        DecodeArguments(model="m", manifest=str(tmp_path / "m.json"), reference_notes=str(file))


def test_a_file_without_requests_is_named(tmp_path):
    # The tokenizer failed with an IndexError; baselines took the worlds' documents without a word.
    (tmp_path / "empty.txt").write_text("\n \n")
    for kind in (DecodeArguments, BaselineArguments):
        with pytest.raises(ValueError, match=r"prompt_file='.*empty.txt', allowed: a request per line; it has none"):
            kind(model="m", prompt_file=str(tmp_path / "empty.txt")).requests()


@pytest.mark.parametrize("text", ["vectors: [[1.0]]", "notes: [[1.0], [1.0, 2.0]]", "notes: [[a]]", "notes:", "{}"])
def test_a_file_of_other_seed_notes_is_named(text, tmp_path):
    # A KeyError was all that a file without the key was told.
    (tmp_path / "notes.yaml").write_text(text)
    arguments = DecodeArguments(model="m", seed_notes=str(tmp_path / "notes.yaml"))
    message = r"seed_notes='.*notes.yaml', allowed: \{notes: \[\[\.\.\.\], \.\.\.\]\} with vectors of equal length"
    with pytest.raises(ValueError, match=message):
        arguments.generate_arguments()


def test_headers_are_as_many_as_streams():
    # The message spoke of stream_prefixes and did not say how many came.
    with pytest.raises(ValueError, match=r"headers=\['A', 'B'\], allowed: one per stream, num_streams=3; got 2"):
        DecodeArguments(model="m", headers=["A", "B"]).generate_arguments(3)
    assert DecodeArguments(model="m", headers=["A", "B"], num_streams=2).generate_arguments(3)["num_streams"] == 2
    assert DecodeArguments(model="m").generate_arguments(3)["num_streams"] == 3
