"""Version 1 of entropy-coded files, which is read and no longer written: a table of frequencies for each tensor.

A code of magnitude 16 or more is a symbol, its leading bits, and a remainder that is stored as it is; so the tables
stay small at any step. Symbols are coded by asymmetric numeral systems (Duda 2013), from the package constriction.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.runtime import sealed

DIRECT = 16  # magnitudes below it are symbols of their own
MOST_CODES_PER_BYTE = 12_000  # of versions 2 and 3 too, where a decision takes 0.0007 bits or more
LARGEST_SYMBOL = 175  # that of 2^24 - 1: 8 * 20 bits of remainder + leading bits 15


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


def decode(stored: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The FP32 weights, of `shapes`, of version 1: multiples of their steps.

    Raises ValueError where `stored` does not fit `shapes` or itself.
    """
    import constriction  # here and below: old files alone need it

    groups = groups_of(shapes)
    _require_stored(stored, len(shapes), groups)
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


def _require_stored(stored: dict[str, torch.Tensor], tensors: int, groups: list[Group]) -> None:
    """Raises ValueError naming what is not as version 1 stores it."""
    sealed.require_tensors(
        stored,
        {
            "entropy:steps": (torch.float32, (tensors,)),
            "entropy:ranges": (torch.int16, (len(groups), 2)),
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
    size = len(stored["entropy:symbols"]) + len(stored["entropy:remainders"])
    if (weights := sum(sum(group.sizes) for group in groups)) > MOST_CODES_PER_BYTE * (size + 8):
        raise ValueError(f"{weights} weights, more than {size} bytes of symbols can stand for")


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


def _distinct(width: np.ndarray) -> Iterable[int]:
    return [int(w) for w in np.unique(width) if w > 0]


def _frequencies(table: np.ndarray) -> np.ndarray:
    """Whole numbers, so that every machine has the same."""
    return np.where(table > 0, np.rint(2.0 ** ((table.astype(np.float64) - 1) / 8)), 0)


def _distribution(table: np.ndarray):
    import constriction

    frequencies = _frequencies(table)
    return constriction.stream.model.Categorical(frequencies / frequencies.sum(), perfect=False)
