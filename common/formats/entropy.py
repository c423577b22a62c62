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

from common.runtime import sealed

DIRECT = 16  # magnitudes below it are symbols of their own
TABLED_REACH = 2**16  # lengths of codes up to it are looked up, those beyond are computed
LARGEST_CODE = 2**24 - 1  # of the integers that float32 holds exactly
LARGEST_SYMBOL = 175  # that of LARGEST_CODE: 8 * 20 bits of remainder + leading bits 15


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
    """The FP32 weights, of `shapes`, that `encode` stored: multiples of their steps.

    Raises ValueError where `stored` does not fit `shapes` or itself. Few bytes may stand for many weights: whoever
    takes `shapes` from a file bounds them first.
    """
    import constriction

    groups = groups_of(shapes)
    _require_stored(stored, len(shapes), len(groups))
    arrays = {name: tensor.cpu().numpy() for name, tensor in stored.items()}
    coder = constriction.stream.stack.AnsCoder(arrays["entropy:symbols"].view("<u4").astype(np.uint32))
    bits = np.unpackbits(arrays["entropy:remainders"])
    steps = dict(zip(shapes, arrays["entropy:steps"], strict=True))
    tables = arrays["entropy:tables"]
    weights = {}
    for group, (low, length) in zip(groups, arrays["entropy:ranges"].tolist(), strict=True):
        table, tables = tables[:length], tables[length:]
        count = sum(group.sizes)
        places = coder.decode(_distribution(table), count) if length > 1 else np.zeros(count, np.int32)
        codes, bits = _join(places.astype(np.int64) + low, bits)
        for name, part in zip(group.names, np.split(codes, np.cumsum(group.sizes)[:-1]), strict=True):
            with np.errstate(over="ignore"):  # infinity says so itself
                values = part.astype(np.float32) * steps[name]
            weights[name] = torch.from_numpy(values).reshape(shapes[name])
    if not coder.is_empty() or len(bits) > 7:  # an empty coder gives symbols for ever: too few cannot be told here
        raise ValueError("entropy:symbols or entropy:remainders hold more than the weights take")
    return {name: weights[name] for name in shapes}


def _require_stored(stored: dict[str, torch.Tensor], tensors: int, groups: int) -> None:
    """Raises ValueError naming what is not as `encode` stores it."""
    sealed.require_tensors(
        stored,
        {
            "entropy:steps": (torch.float32, (tensors,)),
            "entropy:ranges": (torch.int16, (groups, 2)),
            "entropy:tables": (torch.uint8, (None,)),
            "entropy:symbols": (torch.uint8, (None,)),
            "entropy:remainders": (torch.uint8, (None,)),
        },
    )
    steps, ranges, tables = (stored[f"entropy:{part}"] for part in ("steps", "ranges", "tables"))
    low, length = ranges.long().unbind(1)
    if not ((steps > 0) & steps.isfinite()).all():
        raise ValueError("entropy:steps are not all positive numbers")
    if not ((low >= -LARGEST_SYMBOL) & (low <= 0) & (low + length > 0) & (low + length - 1 <= LARGEST_SYMBOL)).all():
        raise ValueError(f"entropy:ranges are not all around 0 and within {LARGEST_SYMBOL}")
    if length.sum() != len(tables):
        raise ValueError(f"entropy:tables have {len(tables)} entries, and entropy:ranges {int(length.sum())}")
    if not all(table.any() for table in tables.split(length.tolist())):
        raise ValueError("entropy:tables hold one of zeros alone")
    if len(stored["entropy:symbols"]) % 4:
        raise ValueError("entropy:symbols are no whole number of words")


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
    if reach > min(TABLED_REACH, codes.size):  # a table longer than the codes costs more than it saves
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
        if len(bits) < w * len(places):
            raise ValueError("entropy:remainders end before the weights do")
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
