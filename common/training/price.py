"""The price of bits: how many an entropy coder needs for codes, how that changes with each, and what a bit has to cost.

The length of a code is that of an ideal coder with a table for each group of tensors, minus the binary logarithm of the
code's share. Between neighbouring integers it is interpolated linearly, so that its slope is the difference of the two
lengths, and latent weights between codes have a gradient (Oktay et al. 2020, "Scalable model compression by entropy
penalized reparameterization", with the tables of the codes that are there in place of a learned density).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from common.formats.entropy_tables import DIRECT, groups_of

TABLED_REACH = 2**16  # codes beyond it count as it
ABSENT = 0.5  # occurrences that a code which does not occur counts as: it costs one bit more than the rarest
PROPORTIONAL, INTEGRAL = 60.0, 4.0  # of `SizeControl`
RESPONSE = 4e-4  # by which log(size) falls in an update at full speed where a bit costs twice what it is worth
MEMORY = 0.98  # of the running mean of the loss, from one update to the next
FARTHEST = 0.1  # excess that it answers to: where the weights are too slow for the ramp, no price makes them faster


@dataclass(frozen=True)
class CodeLengths:
    """bits (2 reach + 1,): of the codes -reach..reach, float32 on the codes' device."""

    bits: torch.Tensor

    def slope(self, latent: torch.Tensor) -> torch.Tensor:
        """By how many bits more the next integer above is coded than that below, of each entry."""
        reach = len(self.bits) // 2
        below = latent.floor().clamp_(-reach, reach - 1).long().add_(reach)
        return (self.bits[1:] - self.bits[:-1])[below]


def measure(latents: dict[str, torch.Tensor]) -> tuple[dict[str, CodeLengths], float]:
    """The lengths of codes of each tensor, by those to which all `latents` are nearest; and the bits of all these."""
    lengths, total = {}, 0.0
    for group in groups_of({name: latent.shape for name, latent in latents.items()}):
        codes = torch.cat([latents[name].detach().flatten() for name in group.names]).round()
        reach = min(int(codes.abs().max()) + 1, TABLED_REACH)
        counts = torch.bincount(codes.clamp_(-reach, reach).long() + reach, minlength=2 * reach + 1).cpu().numpy()
        bits = lengths_of(counts)
        total += float(counts @ bits)
        table = CodeLengths(torch.from_numpy(bits).to(codes))
        lengths |= dict.fromkeys(group.names, table)
    return lengths, total


def lengths_of(counts: np.ndarray) -> np.ndarray:
    """Bits (2 reach + 1,) of the codes -reach..reach that occur so often.

    Codes of magnitude `DIRECT` or more share a symbol with their neighbours, an eighth of an octave, as in
    `common.formats.entropy`, and are told apart by whole bits.
    """
    codes = np.arange(len(counts)) - len(counts) // 2
    exponent = np.frexp(abs(codes))[1] - 1  # floor(log2)
    width = np.where(abs(codes) < DIRECT, 0, exponent - 3)
    symbols = np.sign(codes) * np.where(width == 0, abs(codes), 8 * width + (abs(codes) >> width))
    symbols -= symbols.min()
    of_symbol = np.bincount(symbols, weights=counts)
    return width - np.log2(np.maximum(of_symbol, ABSENT) / counts.sum())[symbols]


@dataclass
class SizeControl:
    """Moves the price of a bit so that the file follows a ramp to `end` bytes over the first half of `updates`.

    The ramp is geometric, without slope at both ends. At the best there is the squared error falls as 2^(-2 bits per
    weight), so that a bit more is worth 2 ln(2) / weights of the error; the price is a multiple of that. Codes that
    have shrunk hardly grow back, so the size must not overshoot. It answers to the price about as a sum does, at the
    rate `RESPONSE`. The multiple is what the slope of the ramp needs at that rate; for what is left, its logarithm
    follows log(size / ramp) and its sum.

    weights: how many; start, size: bytes of the file, at first and when last observed; overhead: of these, what the
    lengths of the codes do not say; error: running mean of the loss; base: logarithm of the multiple where the size is
    on a ramp without slope; slope: what the ramp's adds to that; excess: log(size / ramp).
    """

    end: float
    updates: int
    weights: int
    start: float = 0.0
    size: float = 0.0
    overhead: float = 0.0
    error: float = 0.0
    base: float = 0.0
    slope: float = 0.0
    excess: float = 0.0

    def wanted(self, update: int) -> float:
        """Bytes on the ramp."""
        progress = min(1.0, 2 * update / self.updates)
        return self.start * (self.end / self.start) ** (0.5 - 0.5 * math.cos(math.pi * progress))

    def take_loss(self, update: int, loss: float) -> None:
        self.error = loss if update == 0 else MEMORY * self.error + (1 - MEMORY) * loss

    def take_bits(self, update: int, bits: float, speed: float) -> None:
        """bits: of all codes; speed: of the weights, a share of their fastest: slow ones answer little."""
        self.size = self.overhead + bits / 8
        if update == 0:
            self.start = self.size
        self.excess = max(-FARTHEST, min(FARTHEST, math.log(self.size / self.wanted(update))))
        self.base += INTEGRAL * speed * self.excess
        fall = max(0.0, math.log(self.wanted(update) / self.wanted(update + 1)))
        self.slope = math.log1p(fall / (RESPONSE * speed))

    @property
    def price(self) -> float:
        """Of a bit, in units of the loss."""
        worth = 2 * math.log(2) * self.error / self.weights
        return worth * math.exp(self.base + self.slope + PROPORTIONAL * self.excess)
