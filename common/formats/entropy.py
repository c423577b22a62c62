"""Integers stored at close to their entropy: the codes of weights that are multiples of steps, one for each tensor.

Version 2, which is written: docs/file-format.md says it byte by byte. The codes of a weight are those of its
multiples, or the integers of a trellis that runs down its output channels (`common.formats.trellis`); all go through
one adaptive coder (`common.formats.coder`). Files of version 1 are read (`common.formats.entropy_tables`).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from common.formats import coder, entropy_tables
from common.formats.coder import LARGEST_CODE
from common.formats.entropy_tables import MOST_CODES_PER_BYTE
from common.formats.trellis import NO_TRELLIS, TRELLIS, columns_of, multiples, of_columns
from common.runtime import sealed

_LAYOUTS = {None: 0, 0: 1, 1: 2}  # {the axis of the trellis: what the file says}


def encode(
    codes: dict[str, np.ndarray], steps: dict[str, float], axes: dict[str, int | None] | None = None
) -> dict[str, torch.Tensor]:
    """What a file stores of weights that `codes` {name: integers of the weight's shape} and `steps` {name: step} say.

    axes: {name: the dimension, 0 or 1, down which a trellis runs; None: the weight is codes times step}. Raises
    ValueError for a code beyond LARGEST_CODE.
    """
    axes = axes or {}
    for of_tensor in codes.values():
        if abs(of_tensor).max() > LARGEST_CODE:
            raise ValueError(f"a code of {abs(of_tensor).max()} is larger than {LARGEST_CODE}")
    columns = {n: columns_of(np.atleast_1d(c).astype(np.int32), axes.get(n) or 0) for n, c in codes.items()}
    order = _order({name: of_tensor.shape for name, of_tensor in codes.items()})
    data = coder.write([(columns[name], NO_TRELLIS if axes.get(name) is None else TRELLIS) for name in order])
    return {
        "entropy:steps": torch.tensor([steps[name] for name in codes], dtype=torch.float32),
        "entropy:layout": torch.tensor([_LAYOUTS[axes.get(name)] for name in codes], dtype=torch.uint8),
        "entropy:codes": torch.from_numpy(np.frombuffer(data, np.uint8).copy()),
    }


def decode(stored: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The FP32 weights, of `shapes`, that `encode` stored: multiples of their steps.

    Raises ValueError where `stored` does not fit `shapes` or itself. Few bytes may stand for many weights (at most
    MOST_CODES_PER_BYTE): whoever takes `shapes` from a file bounds them first.
    """
    if version_of(stored) == 1:
        return entropy_tables.decode(stored, shapes)
    _require_stored(stored, shapes)
    steps, weights = dict(zip(shapes, stored["entropy:steps"].cpu().numpy(), strict=True)), {}
    for name, codes, axis in _read(stored, shapes):
        with np.errstate(over="ignore"):  # infinity says so itself
            values = multiples(codes, NO_TRELLIS if axis is None else TRELLIS).astype(np.float32) * steps[name]
        weights[name] = torch.from_numpy(of_columns(values, tuple(shapes[name]) or (1,), axis or 0))
    return {name: weights[name].reshape(shape) for name, shape in shapes.items()}


def extend(
    stored: dict[str, torch.Tensor],
    shapes: dict[str, torch.Size],
    codes: dict[str, np.ndarray],
    steps: dict[str, float],
) -> dict[str, torch.Tensor]:
    """What a file stores of the weights, of `shapes`, that `stored` holds, and of further ones, as `encode` takes them,
    which come last. Raises ValueError for what version 1 stores."""
    if version_of(stored) != 2:
        raise ValueError("files of version 1 are not extended")
    integers, axes = dict.fromkeys(shapes), dict.fromkeys(codes)  # in the order of `shapes`, not of the stream
    former = dict(zip(shapes, stored["entropy:steps"].tolist(), strict=True))
    for name, columns, axis in _read(stored, shapes):
        integers[name] = of_columns(columns, tuple(shapes[name]) or (1,), axis or 0).reshape(shapes[name])
        axes[name] = axis
    return encode(integers | codes, former | steps, axes)


def _read(
    stored: dict[str, torch.Tensor], shapes: dict[str, torch.Size]
) -> Iterator[tuple[str, np.ndarray, int | None]]:
    """Of each tensor, in the order of the stream: name, integers as a matrix of columns, and axis of its trellis."""
    layouts = dict(zip(shapes, stored["entropy:layout"].tolist(), strict=True))
    reader = coder.Reader(stored["entropy:codes"].cpu().numpy())
    for name in _order(shapes):
        shape, axis = tuple(shapes[name]) or (1,), max(0, layouts[name] - 1)
        matrix = (math.prod(shape) // shape[axis], shape[axis])
        codes = reader.matrix(matrix, TRELLIS if layouts[name] else NO_TRELLIS)
        yield name, codes, axis if layouts[name] else None
    reader.finish()


def version_of(stored: dict[str, torch.Tensor]) -> int:
    """Of the format: 1 has tables."""
    return 1 if "entropy:tables" in stored else 2


def _order(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Of the tensors in the stream: first those of two dimensions or more, whose statistics are alike."""
    return sorted(shapes, key=lambda name: len(shapes[name]) < 2)


def _require_stored(stored: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raises ValueError naming what is not as `encode` stores it."""
    tensors = len(shapes)
    sealed.require_tensors(
        stored,
        {
            "entropy:steps": (torch.float32, (tensors,)),
            "entropy:layout": (torch.uint8, (tensors,)),
            "entropy:codes": (torch.uint8, (None,)),
        },
    )
    steps, layouts, size = stored["entropy:steps"], stored["entropy:layout"].tolist(), len(stored["entropy:codes"])
    if not ((steps > 0) & steps.isfinite()).all():
        raise ValueError("entropy:steps are not all positive numbers")
    for layout, (name, shape) in zip(layouts, shapes.items(), strict=True):
        if layout not in _LAYOUTS.values() or (layout and len(shape) < 2):
            raise ValueError(
                f"entropy:layout of {name} is {layout}, which is none of a tensor of {len(shape)} dimensions"
            )
    if (weights := sum(math.prod(shape) for shape in shapes.values())) > MOST_CODES_PER_BYTE * (size + 8):
        raise ValueError(f"{weights} weights, more than {size} bytes of codes can stand for")
