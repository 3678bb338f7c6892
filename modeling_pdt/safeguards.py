"""Sensitivity: how far the logits move when the notes do, measured while decoding.

Letters: A rows in the trunk's batch, W notes of a window, N note width, V vocabulary.
"""

import torch

from .policies import SensitivityProbe


class SensitivityMeter:
    """
    Disturbs notes and compares logits at every so many exchanges of notes.

    Args:
        probe (`SensitivityProbe`, *optional*): `None`: never.
        seed (`int`): Of the noise.
    """

    def __init__(self, probe: SensitivityProbe | None, seed: int) -> None:
        self.probe, self.exchanges = probe, 0
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def due(self) -> bool:
        """Whether the exchange that happens now is to be measured; counts it."""
        self.exchanges += 1
        return (self.exchanges - 1) % self.probe.every == 0

    def disturb(self, notes_AWN: torch.Tensor, mask_AW: torch.Tensor) -> torch.Tensor:
        """The notes with noise on the visible ones, whose norm per row is `epsilon` times that of these notes."""
        noise = torch.randn(notes_AWN.shape, generator=self.generator, device="cpu").to(notes_AWN) * mask_AW[..., None]
        seen = (notes_AWN * mask_AW[..., None]).flatten(1).norm(dim=1)
        size = noise.flatten(1).norm(dim=1).clamp(min=torch.finfo(noise.dtype).tiny)
        return notes_AWN + noise * (self.probe.epsilon * seen / size)[:, None, None]

    def ratios(self, logits_AV: torch.Tensor, disturbed_AV: torch.Tensor) -> torch.Tensor:
        """Relative change of the logits per relative change of the notes `[A]`."""
        logits, disturbed = logits_AV.float(), disturbed_AV.float()
        return (disturbed - logits).norm(dim=1) / logits.norm(dim=1) / self.probe.epsilon
