"""Compares `generate` with the reference decoder on random calls."""

from functools import cache

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.decoding_cases import cases

# Closer decisions than this are ties: the two decoders add in different orders.
TIE = 1e-5
EXACT = ("kind", "round", "attempt", "start", "end", "tokens", "call", "forced")
REAL = ("agreement", "coverage")


def told(output):
    """What the trace says of every row's blocks: what must be equal, and what must be close."""
    exact, real = ([[] for rows in output.streams for _ in rows] for _ in range(2))
    for event in output.trace.events:
        if event["kind"] in ("commit", "rollback", "stall"):
            row = event["prompt"] * len(output.streams[0]) + event["stream"]
            exact[row].append([event.get(name) for name in EXACT])
            real[row].append([event[name] for name in REAL])
    return exact, real


def close(found, expected):
    """Whether agreement and coverage of the blocks of a row are what they are expected to be."""
    pairs = [pair for blocks in zip(found, expected, strict=True) for pair in zip(*blocks, strict=True)]
    return all(value == pytest.approx(other, abs=1e-4) for value, other in pairs)


def differences(case, reference):
    """The rows on which `generate` disagrees with a reference decoder that has run."""
    output = case.decode()
    results = [(result.token_ids, result.blocks, result.retries) for rows in output.streams for result in rows]
    found = []
    for row, result, blocks, scores in zip(reference.rows, results, *told(output), strict=True):
        expected, values = ([[event[name] for name in names] for event in row.events] for names in (EXACT, REAL))
        same = result == (row.tokens, row.blocks, row.retries) and blocks == expected
        if not same or not close(scores, values):
            found.append((row.number, blocks, expected, scores, values))
    return found


def compare(examples, seed, **choices):
    """
    Compares so many random calls; returns how many of them differ because of a tie.

    Raises:
        AssertionError: For a call that differs for another reason.
    """
    ties = []

    def check(case):
        reference = case.reference()
        found = differences(case, reference)
        assert not found or reference.closest < TIE, found[0]
        ties.extend([case] if found else [])

    for_random_cases(check, examples, seed, tuple(Phase), **choices)
    return len(ties)


def for_random_cases(check, examples, seed, phases, **choices):
    """
    Calls `check` with so many random calls; with more `phases` it looks for the simplest one that fails.

    Hypothesis varies a call that it has drawn for a while; with a seed for each they have nothing in common.
    """
    for number in range(examples):
        for_one_case(check, 1000 * seed + number, phases, **choices)


def for_one_case(check, seed, phases, **choices):
    seen = []

    @hypothesis.seed(seed)
    @settings(max_examples=2, phases=phases, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(**choices))
    def run(case):
        # The first call is the simplest one, whatever the seed.
        if seen:
            check(case)
        seen.append(case)

    run()


@cache
def drawn_cases(examples, seed, **choices):
    """So many random calls."""
    drawn = []
    for_random_cases(drawn.append, examples, seed, [Phase.generate], **choices)
    return drawn


@cache
def drawn_references(examples, seed, **choices):
    """So many random calls without a tie, and their reference decoders."""
    pairs = [(case, case.reference()) for case in drawn_cases(examples, seed, **choices)]
    return [(case, reference) for case, reference in pairs if reference.closest >= TIE]
