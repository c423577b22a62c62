"""Integers stored at close to their entropy: the codes of weights that are multiples of steps, one for each tensor.

A code of magnitude 16 or more is a symbol, its leading bits, and a remainder that is stored as it is; so the tables of
frequencies stay small at any step. Symbols are coded by asymmetric numeral systems (Duda 2013), from the package
constriction. 1-D tensors, too small for a table each, share one.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

DIRECT = 16  # magnitudes below it are symbols of their own
TABLED_REACH = 2**16  # lengths of codes up to it are looked up, those beyond are computed
LARGEST_CODE = 2**24 - 1  # of the integers that float32 holds exactly


@dataclass(frozen=True)
class Group:
    """Tensors whose codes share a table: their names and numbers of entries."""

    names: list[str]
    sizes: list[int]


def groups_of(shapes: dict[str, Sequence[int]]) -> list[Group]:
    """One group for each tensor of two dimensions or more, and one for all others."""
    alone = [Group([name], [math.prod(shape)]) for name, shape in shapes.items() if len(shape) > 1]
    small = [name for name, shape in shapes.items() if len(shape) < 2]
    return alone + ([Group(small, [math.prod(shapes[name]) for name in small])] if small else [])


def encode(codes: dict[str, np.ndarray], steps: dict[str, float]) -> dict[str, torch.Tensor]:
    """What a file stores of weights that are `codes` {name: integers of the weight's shape} times `steps` {name: step}.

    Raises ValueError for a code beyond LARGEST_CODE.
    """
    import constriction  # here and below: entropy coding alone needs it

    def describe(group: Group) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """Symbols from 0 up, the lowest of them, the table of their frequencies, and the bits of the remainders."""
        of_group = np.concatenate([codes[name].ravel() for name in group.names])
        if abs(of_group).max() > LARGEST_CODE:
            raise ValueError(f"a code of {abs(of_group).max()} is larger than {LARGEST_CODE}")
        symbols, extra, widths = _split(of_group)
        low, table = _table(symbols)
        return (symbols - low).astype(np.int32), low, table, _remainder_bits(extra, widths)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy's loops leave the interpreter to the others
        described = list(pool.map(describe, groups_of({name: of.shape for name, of in codes.items()})))
    coder = constriction.stream.stack.AnsCoder()
    for symbols, _, table, _ in reversed(described):  # the coder is a stack
        if len(table) > 1:
            coder.encode_reverse(symbols, _distribution(table))
    _, lows, tables, remainders = zip(*described, strict=True)
    return {
        "entropy:steps": torch.tensor([steps[name] for name in codes], dtype=torch.float32),
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


def code_lengths(codes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
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
    if reach > TABLED_REACH:
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
