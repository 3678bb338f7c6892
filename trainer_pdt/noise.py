"""Noise on the student's bus as pure functions of a `torch.Generator`.

Draws are made on the generator's device with shapes that do not depend on the probabilities, so that changing one
probability leaves the other draws of a step as they are. Letters: B documents, S streams, R = B * S rows in document
order, K rounds. What a stage asks for is drawn once per step by `draw_noise`.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .curriculum import Stage, check_range

SIDE_DRAWS = ("note_paraphrase", "note_contradict", "item_contradict")
"""Noise that draws with a generator of its own."""


@dataclass(frozen=True)
class NoiseDraw:
    """
    Everything random about one step's bus.

    Args:
        teacher_RK (`BoolTensor` of shape `[rows, rounds]`): True = the bus holds the teacher's note of that block,
            False = the one that the row wrote itself.
        keep_RK (`BoolTensor` of shape `[rows, rounds]`): False = the block's notes never arrive.
        producer_R (`BoolTensor` of shape `[rows]`): False = no sibling sees this row's notes.
        source_R (`LongTensor` of shape `[rows]`): Row whose notes stand on the bus in the place of this row's:
            `notes = notes[source_R]`, masks alike.
        lag_R (`LongTensor` of shape `[rows]`): Lag that each row reads with.
        paraphrase_RK (`BoolTensor` of shape `[rows, rounds]`): The teacher's note is told in other words.
        contradict_RK (`BoolTensor` of shape `[rows, rounds]`): The teacher's note tells other values.
        contradict_BP (`BoolTensor` of shape `[documents, items]`): Another document's plan item stands here.
    """

    teacher_RK: Tensor
    keep_RK: Tensor
    producer_R: Tensor
    source_R: Tensor
    lag_R: Tensor
    paraphrase_RK: Tensor
    contradict_RK: Tensor
    contradict_BP: Tensor

    @property
    def swapped_R(self) -> Tensor:
        """Rows that read another document's notes, `BoolTensor` of shape `[rows]`."""
        return self.source_R != torch.arange(len(self.source_R), device=self.source_R.device)


def draw_noise(
    stage: Stage,
    num_documents: int,
    num_streams: int,
    num_rounds: int,
    lag: int,
    generator: torch.Generator,
    num_items: int = 0,
) -> NoiseDraw:
    """
    All draws that a stage asks for, the first five in a fixed order, the others each with a generator of its own.
    Gaussian noise is added to the notes with `add_gaussian`.

    Args:
        stage (`Stage`): Probabilities.
        num_documents (`int`): Documents in the batch.
        num_streams (`int`): Streams per document.
        num_rounds (`int`): Rounds per row.
        lag (`int`): Lag of decoding, at least 1.
        generator (`torch.Generator`): Source of randomness, newly seeded.
        num_items (`int`, *optional*, defaults to 0): Plan items per document; with `item_contradict`, those of the
            batch.
    """
    num_rows = num_documents * num_streams
    blocks = (num_rows, num_rounds)
    apart = {name: side_generator(generator, name) for name in SIDE_DRAWS}
    return NoiseDraw(
        teacher_RK=mix_bus(num_rows, num_rounds, stage.bus_mix, generator),
        keep_RK=drop_notes(
            torch.ones(num_rows, num_rounds, dtype=torch.bool, device=generator.device), stage.note_drop, generator
        ),
        producer_R=drop_streams(num_rows, stage.stream_dropout, generator),
        source_R=swap_documents(num_documents, num_streams, stage.note_swap, generator),
        lag_R=jitter_lag(num_rows, lag, stage.lag_jitter, generator),
        paraphrase_RK=_bernoulli("note_paraphrase", blocks, stage.note_paraphrase, apart["note_paraphrase"]),
        contradict_RK=_bernoulli("note_contradict", blocks, stage.note_contradict, apart["note_contradict"]),
        contradict_BP=_bernoulli(
            "item_contradict", (num_documents, num_items), stage.item_contradict, apart["item_contradict"]
        ),
    )


def side_generator(generator: torch.Generator, name: str) -> torch.Generator:
    """
    A generator of its own for one kind of noise, so that its draws move no other ones.

    Args:
        generator (`torch.Generator`): What matters is the number it was seeded with, not what it has drawn since.
        name (`str`): Of the noise.
    """
    seed = random.Random(f"{generator.initial_seed()}/{name}").getrandbits(63)
    return torch.Generator(generator.device).manual_seed(seed)


def drop_item_tokens(mask_BPL: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """
    Hides tokens of the plan items' texts; an item that would lose all of them keeps all.

    Args:
        mask_BPL (`BoolTensor` of shape `[documents, items, tokens]`): Real tokens.
        probability (`float`): Probability that a token is hidden, 0 to 1.
        generator (`torch.Generator`): Source of randomness.
    """
    dropped = _bernoulli("item_drop", tuple(mask_BPL.shape), probability, generator).to(mask_BPL.device)
    kept = mask_BPL.bool() & ~dropped
    return torch.where(kept.any(dim=-1, keepdim=True), kept, mask_BPL.bool())


def mix_bus(num_rows: int, num_rounds: int, probability: float, generator: torch.Generator) -> Tensor:
    """
    Who writes the note of each block.

    Args:
        num_rows (`int`): Rows.
        num_rounds (`int`): Rounds per row.
        probability (`float`): Probability of the teacher's note, 0 to 1.
        generator (`torch.Generator`): Source of randomness.

    Returns:
        `BoolTensor` of shape `[rows, rounds]`: True = teacher's note, False = self-written.
    """
    return _bernoulli("bus_mix", (num_rows, num_rounds), probability, generator)


def drop_notes(mask: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """
    Lose notes at random.

    Args:
        mask (`BoolTensor` of any shape): Notes that exist.
        probability (`float`): Probability that one is lost, 0 to 1.
        generator (`torch.Generator`): Source of randomness.

    Returns:
        `BoolTensor` of the same shape: Notes that are left.
    """
    return mask & ~_bernoulli("note_drop", tuple(mask.shape), probability, generator).to(mask.device)


def drop_streams(num_rows: int, probability: float, generator: torch.Generator) -> Tensor:
    """
    Silence whole producers: their siblings see none of their notes.

    Args:
        num_rows (`int`): Rows.
        probability (`float`): Probability that a row is silenced, 0 to 1.
        generator (`torch.Generator`): Source of randomness.

    Returns:
        `BoolTensor` of shape `[rows]`: True = the row's notes are visible.
    """
    return ~_bernoulli("stream_dropout", (num_rows,), probability, generator)


def swap_documents(num_documents: int, num_streams: int, probability: float, generator: torch.Generator) -> Tensor:
    """
    Let documents read another document's notes, stream by stream. A batch of one document has nothing to swap with and
    stays as it is.

    Args:
        num_documents (`int`): Documents in the batch.
        num_streams (`int`): Streams per document.
        probability (`float`): Probability that a document's notes are replaced, 0 to 1.
        generator (`torch.Generator`): Source of randomness.

    Returns:
        `LongTensor` of shape `[rows]`: Row whose notes are used in the place of each row's own.
    """
    chosen_B = _bernoulli("note_swap", (num_documents,), probability, generator)
    uniform_B = torch.rand(num_documents, generator=generator, device=generator.device)
    steps_B = 1 + (uniform_B * (num_documents - 1)).long().clamp(max=max(num_documents - 2, 0))
    own_B = torch.arange(num_documents, device=generator.device)
    source_B = torch.where(chosen_B, (own_B + steps_B) % num_documents, own_B)
    streams_S = torch.arange(num_streams, device=generator.device)
    return (source_B[:, None] * num_streams + streams_S).flatten()


def jitter_lag(num_rows: int, lag: int, probability: float, generator: torch.Generator) -> Tensor:
    """
    Let rows read notes of the same round, as a rewrite does.

    Args:
        num_rows (`int`): Rows.
        lag (`int`): Lag of decoding, at least 1.
        probability (`float`): Probability of lag 0, 0 to 1.
        generator (`torch.Generator`): Source of randomness.

    Returns:
        `LongTensor` of shape `[rows]`: `lag` or 0.
    """
    check_range("lag", lag, 1)
    fresh_R = _bernoulli("lag_jitter", (num_rows,), probability, generator)
    return torch.full((num_rows,), lag, device=generator.device).masked_fill(fresh_R, 0)


def add_gaussian(notes: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """
    Blur notes; gradients pass to the notes unchanged.

    Args:
        notes (`Tensor` of any shape): Notes, RMS about 1.
        std (`float`): Standard deviation, at least 0; 0 returns the notes themselves without a draw.
        generator (`torch.Generator`): Source of randomness.

    Returns:
        `Tensor` of the same shape and type.
    """
    check_range("note_noise", std, 0.0)
    if std == 0:
        return notes
    noise = torch.randn(notes.shape, generator=generator, device=generator.device)
    return notes + (std * noise).to(notes)


def _bernoulli(name: str, shape: tuple[int, ...], probability: float, generator: torch.Generator) -> Tensor:
    check_range(name, probability, 0.0, 1.0)
    return torch.rand(shape, generator=generator, device=generator.device) < probability
