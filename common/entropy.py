"""Entropy-coded weights: uniform steps, one for each tensor, and codes stored at close to their entropy.

A code of magnitude 16 or more is a symbol, its leading bits, and a remainder that is stored as it is; so the tables of
frequencies stay small at any step. Symbols are coded by asymmetric numeral systems (Duda 2013), from the package
constriction. 1-D tensors, too small for a table each, share one.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from common.feedback import Feedback, toward_zero

DIRECT = 16  # magnitudes below it are symbols of their own
LARGEST_CODE = 2**24 - 1  # of the integers that float32 holds exactly
# Steps proportional to 1 / sqrt(F) spend squared error F step^2 / 12 for entropy -log2(step); this is the price of a
# bit in units of F step^2 at which both move together.
PRICE_OF_A_BIT = np.log(2) / 6
FEEDBACK_REACH = 2**16  # codes beyond it are of steps so fine that they are rounded entry by entry


@dataclass(frozen=True)
class Group:
    """Tensors whose codes share a table: their names and numbers of entries."""

    names: list[str]
    sizes: list[int]


def groups_of(shapes: dict[str, torch.Size]) -> list[Group]:
    """One group for each tensor of two dimensions or more, and one for all others."""
    alone = [Group([name], [shape.numel()]) for name, shape in shapes.items() if len(shape) > 1]
    small = [name for name, shape in shapes.items() if len(shape) < 2]
    return alone + ([Group(small, [shapes[name].numel() for name in small])] if small else [])


def encode(
    weights: dict[str, torch.Tensor],
    steps: dict[str, float],
    feedback: dict[str, Feedback] | None = None,
    price: float = PRICE_OF_A_BIT,
) -> dict[str, torch.Tensor]:
    """What a file stores of FP32 `weights`, each rounded to multiples of its step.

    Where the next code toward zero is so much shorter that it pays for its error, it is taken, at the `price` of a bit
    in squared steps. Weights that have `feedback` are rounded by it, the others entry by entry.
    Raises ValueError for a step that is not positive or so small that codes pass LARGEST_CODE.
    """
    import constriction  # here and below: entropy coding alone needs it

    feedback = feedback or {}
    rounded_steps = {name: np.float32(steps[name]) for name in weights}

    def choose(group: Group) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """Symbols from 0 up, the lowest of them, the table of their frequencies, and the bits of the remainders."""
        scaled = np.concatenate([_scaled(weights[name], rounded_steps[name]) for name in group.names])
        codes = _choose_codes(scaled, price)
        if (rounding := feedback.get(group.names[0])) is not None and abs(codes).max() < FEEDBACK_REACH:
            codes = _choose_with_feedback(weights[group.names[0]].shape, scaled, codes, rounding, price)
        symbols, extra, widths = _split(codes)
        low, table = _table(symbols)
        return (symbols - low).astype(np.int32), low, table, _remainder_bits(extra, widths)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy's loops leave the interpreter to the others
        chosen = list(pool.map(choose, groups_of({name: weight.shape for name, weight in weights.items()})))
    coder = constriction.stream.stack.AnsCoder()
    for symbols, _, table, _ in reversed(chosen):  # the coder is a stack
        if len(table) > 1:
            coder.encode_reverse(symbols, _distribution(table))
    _, lows, tables, remainders = zip(*chosen, strict=True)
    return {
        "entropy:steps": torch.from_numpy(np.array(list(rounded_steps.values()), np.float32)),
        "entropy:ranges": torch.from_numpy(
            np.array([(low, len(table)) for low, table in zip(lows, tables, strict=True)], np.int16)
        ),
        "entropy:tables": torch.from_numpy(np.concatenate(tables)),
        "entropy:symbols": torch.from_numpy(coder.get_compressed().astype("<u4").view(np.uint8)),
        "entropy:remainders": torch.from_numpy(np.packbits(np.concatenate(remainders))),
    }


def decode(stored: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The FP32 weights, of `shapes`, that `encode` stored: multiples of their steps."""
    import constriction

    words = stored["entropy:symbols"].numpy().view("<u4").astype(np.uint32)
    coder = constriction.stream.stack.AnsCoder(words)
    bits = np.unpackbits(stored["entropy:remainders"].numpy())
    steps = dict(zip(shapes, stored["entropy:steps"].numpy(), strict=True))
    tables = stored["entropy:tables"].numpy()
    weights = {}
    for group, (low, length) in zip(groups_of(shapes), stored["entropy:ranges"].tolist(), strict=True):
        table, tables = tables[:length], tables[length:]
        count = sum(group.sizes)
        places = coder.decode(_distribution(table), count) if length > 1 else np.zeros(count, np.int32)
        codes, bits = _join(places.astype(np.int64) + low, bits)
        for name, part in zip(group.names, np.split(codes, np.cumsum(group.sizes)[:-1]), strict=True):
            values = part.astype(np.float32) * steps[name]
            weights[name] = torch.from_numpy(values).reshape(shapes[name])
    return {name: weights[name] for name in shapes}


def _scaled(weight: torch.Tensor, step: np.float32) -> np.ndarray:
    if not step > 0:
        raise ValueError(f"a step of {step} is not positive")
    scaled = weight.numpy().astype(np.float64).ravel() / float(step)
    if abs(scaled).max() > LARGEST_CODE:
        raise ValueError(f"a step of {step} is too small for a weight of {weight.abs().max():.3g}")
    return scaled


def _choose_codes(scaled: np.ndarray, price: float, rounds: int = 3) -> np.ndarray:
    """Integers near `scaled`, entry by entry."""
    codes = np.rint(scaled).astype(np.int64)
    for _ in range(rounds):
        codes = toward_zero(scaled, codes, _code_lengths(codes), price)
    return codes


def _choose_with_feedback(
    shape: torch.Size, scaled: np.ndarray, codes: np.ndarray, feedback: Feedback, price: float, rounds: int = 2
) -> np.ndarray:
    """Integers near `scaled` (entries of a weight of `shape`), by feedback; `codes`: those chosen entry by entry."""
    rows = feedback.rows(torch.from_numpy(scaled).reshape(shape)).numpy()
    for _ in range(rounds):
        codes = feedback.round(rows, _code_lengths(codes.ravel()), price)
    return np.ascontiguousarray(feedback.weight(codes, shape)).ravel()


def _code_lengths(codes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function: the bits that each of its codes would take beside `codes`; one that has no symbol there takes as
    many as the rarest."""
    symbols, _, _ = _split(codes)
    low, table = _table(symbols)
    frequencies = _frequencies(table)
    lengths = -np.log2(frequencies.clip(0.5) / frequencies.sum())

    def bits(candidates: np.ndarray) -> np.ndarray:
        symbols, _, widths = _split(candidates)
        known = (symbols >= low) & (symbols < low + len(table))
        return np.where(known, lengths[(symbols - low).clip(0, len(table) - 1)], lengths.max()) + widths

    reach = 2 * int(abs(codes).max()) + DIRECT  # feedback may carry codes beyond the largest
    if reach > FEEDBACK_REACH:
        return bits
    table_of_bits = bits(np.arange(-reach, reach + 1))
    return lambda candidates: table_of_bits[(candidates + reach).clip(0, 2 * reach)]


def _split(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed symbols, remainders, and the number of bits of each remainder."""
    magnitude = abs(codes)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, 3)  # floor(log2), and at least that of 8
    width = np.where(magnitude < DIRECT, 0, exponent - 3)
    leading = magnitude >> width  # 8..15 where there is a remainder
    symbol = np.where(magnitude < DIRECT, magnitude, 8 * width + leading)
    return np.sign(codes) * symbol, magnitude - (leading << width), width


def _join(symbols: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes of `symbols` and of the remainders at the start of `bits`; and the bits that are left."""
    magnitude = abs(symbols)
    width = np.where(magnitude < DIRECT, 0, magnitude // 8 - 1)
    codes = np.where(magnitude < DIRECT, magnitude, (magnitude - 8 * width) << width)
    for w in _distinct(width):
        places = np.flatnonzero(width == w)
        field, bits = bits[: w * len(places)].reshape(-1, w), bits[w * len(places) :]
        codes[places] += field @ (1 << np.arange(w - 1, -1, -1))
    return np.sign(symbols) * codes, bits


def _remainder_bits(remainders: np.ndarray, width: np.ndarray) -> np.ndarray:
    fields = [
        ((remainders[width == w][:, None] >> np.arange(w - 1, -1, -1)) & 1).astype(np.uint8).ravel()
        for w in _distinct(width)
    ]
    return np.concatenate([np.zeros(0, np.uint8), *fields])


def _distinct(width: np.ndarray) -> Iterable[int]:
    return [int(w) for w in np.unique(width) if w > 0]


def _table(symbols: np.ndarray) -> tuple[int, np.ndarray]:
    """The lowest symbol, and for each from there the eighths of the binary logarithm of its count, plus 1; 0: none."""
    low, high = min(int(symbols.min()), 0), max(int(symbols.max()), 0)
    counts = np.bincount(symbols - low, minlength=high - low + 1)
    return low, np.where(counts > 0, np.rint(8 * np.log2(counts.clip(1))) + 1, 0).astype(np.uint8)


def _frequencies(table: np.ndarray) -> np.ndarray:
    """Whole numbers, so that every machine has the same."""
    return np.where(table > 0, np.rint(2.0 ** ((table.astype(np.float64) - 1) / 8)), 0)


def _distribution(table: np.ndarray):
    import constriction

    frequencies = _frequencies(table)
    return constriction.stream.model.Categorical(frequencies / frequencies.sum(), perfect=False)
