"""Integers stored at close to their entropy: the codes of weights that are multiples of steps, one for each tensor or
one for each of its rows (output channels).

docs/file-format.md says it byte by byte: version 3, and version 2 where no tensor has steps by rows. The codes of a
weight are those of its multiples, or the integers of a trellis that runs down its output channels
(`common.formats.trellis`); all go through one adaptive coder (`common.formats.coder`). Files of version 1 are read
(`common.formats.entropy_tables`).
"""

import math

import numpy as np
import torch

from common.formats import coder, entropy_tables
from common.formats.coder import LARGEST_CODE
from common.formats.entropy_tables import MOST_CODES_PER_BYTE
from common.formats.row_steps import Step, join, parts, row_axis
from common.formats.trellis import NO_TRELLIS, TRELLIS, columns_of, multiples, of_columns
from common.runtime import sealed

_AXES = (None, 0, 1)  # a layout is t + 3 r: the places here of the trellis' axis and of that of steps by rows


def encode(
    codes: dict[str, np.ndarray], steps: dict[str, Step], axes: dict[str, int | None] | None = None
) -> dict[str, torch.Tensor]:
    """What a file stores of weights that `codes` {name: integers of the weight's shape} and `steps` {name: step, or
    steps by rows as `row_steps.stored_steps` has them} say.

    axes: {name: the dimension, 0 or 1, down which a trellis runs; None: the weight is codes times step}. Raises
    ValueError for a code beyond LARGEST_CODE, and for steps that no file can say of the weight.
    """
    axes = axes or {}
    for of_tensor in codes.values():
        if abs(of_tensor).max() > LARGEST_CODE:
            raise ValueError(f"a code of {abs(of_tensor).max()} is larger than {LARGEST_CODE}")
    columns = {n: columns_of(np.atleast_1d(c).astype(np.int32), axes.get(n) or 0) for n, c in codes.items()}
    order = _order({name: of_tensor.shape for name, of_tensor in codes.items()})
    rows = {name: row_axis(steps[name]) for name in codes}
    bases, exponents = {}, []
    for name, axis in rows.items():
        bases[name], of_rows = parts(steps[name])
        if axis is None:
            continue
        fits = axis < 2 <= codes[name].ndim == np.ndim(steps[name])
        if not fits or np.size(steps[name]) != codes[name].shape[axis]:
            raise ValueError(f"steps of shape {np.shape(steps[name])} are not those of rows of {name}")
        exponents.append((of_rows[None].astype(np.int32), NO_TRELLIS))
    matrices = [(columns[name], NO_TRELLIS if axes.get(name) is None else TRELLIS) for name in order]
    data = coder.write(exponents + matrices)
    layouts = [_AXES.index(axes.get(name)) + len(_AXES) * _AXES.index(rows[name]) for name in codes]
    return {
        "entropy:steps": torch.tensor([bases[name] for name in codes], dtype=torch.float32),
        "entropy:layout": torch.tensor(layouts, dtype=torch.uint8),
        "entropy:codes": torch.from_numpy(np.frombuffer(data, np.uint8).copy()),
    }


def decode(stored: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The FP32 weights, of `shapes`, that `encode` stored: multiples of their steps.

    Raises ValueError where `stored` does not fit `shapes` or itself. Few bytes may stand for many weights (at most
    MOST_CODES_PER_BYTE): whoever takes `shapes` from a file bounds them first.
    """
    if version_of(stored) == 1:
        return entropy_tables.decode(stored, shapes)
    reader, weights = _Reader(stored, shapes), {}
    for name in _order(shapes):
        with np.errstate(over="ignore"):  # infinity says so itself
            values = multiples(*reader.codes(name)).astype(np.float32)
            weights[name] = torch.from_numpy(np.asarray(reader.in_shape(name, values) * reader.steps[name]))
    reader.finish()
    return {name: weights[name] for name in shapes}


def steps_of(stored: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, Step]:
    """{name: step}, float32, of all of a tensor or by rows: what its codes are multiples of. Does not read the codes;
    raises ValueError where the rest does not fit `shapes`."""
    if version_of(stored) == 1:
        return dict(zip(shapes, stored["entropy:steps"].cpu().numpy(), strict=True))
    return _Reader(stored, shapes).steps


def extend(
    stored: dict[str, torch.Tensor],
    shapes: dict[str, torch.Size],
    codes: dict[str, np.ndarray],
    steps: dict[str, Step],
) -> dict[str, torch.Tensor]:
    """What a file stores of the weights, of `shapes`, that `stored` holds, and of further ones, as `encode` takes them,
    which come last. Raises ValueError for what version 1 stores."""
    if version_of(stored) == 1:
        raise ValueError("files of version 1 are not extended")
    reader = _Reader(stored, shapes)
    read = {name: reader.in_shape(name, reader.codes(name)[0]) for name in _order(shapes)}
    reader.finish()
    own = {name: read[name] for name in shapes}  # in the order of `shapes`, not of the stream
    return encode(own | codes, reader.steps | steps, reader.axes | dict.fromkeys(codes))


class _Reader:
    """Reads what `encode` stored: steps {name: step, float32} and axes {name: that of its trellis} at once, codes
    tensor by tensor in the order of the stream. Raises ValueError where `stored` does not fit `shapes` or itself."""

    def __init__(self, stored: dict[str, torch.Tensor], shapes: dict[str, torch.Size]):
        _require_stored(stored, shapes)
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        layouts = dict(zip(shapes, stored["entropy:layout"].tolist(), strict=True))
        self.axes = {name: _AXES[layout % len(_AXES)] for name, layout in layouts.items()}
        self._coder = coder.Reader(stored["entropy:codes"].cpu().numpy())
        self.steps = dict(zip(shapes, stored["entropy:steps"].cpu().numpy(), strict=True))
        for name, layout in layouts.items():
            if (axis := _AXES[layout // len(_AXES)]) is not None:
                exponents = self._coder.matrix((1, shapes[name][axis]), NO_TRELLIS)[0]
                try:
                    self.steps[name] = join(self.steps[name], exponents, axis, len(shapes[name]))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None

    def codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The tensor's integers, a matrix of columns, and the table of its trellis."""
        shape, axis = self._shapes[name] or (1,), self.axes[name] or 0
        table = NO_TRELLIS if self.axes[name] is None else TRELLIS
        return self._coder.matrix((math.prod(shape) // shape[axis], shape[axis]), table), table

    def in_shape(self, name: str, columns: np.ndarray) -> np.ndarray:
        """The tensor that these are the columns of."""
        shape = self._shapes[name]
        return of_columns(columns, shape or (1,), self.axes[name] or 0).reshape(shape)

    def finish(self) -> None:
        """Raises ValueError where there is more to read."""
        self._coder.finish()


def version_of(stored: dict[str, torch.Tensor]) -> int:
    """Of the format: 1 where there are tables, 3 where a tensor has steps by rows, otherwise 2."""
    if "entropy:tables" in stored:
        return 1
    layouts = stored.get("entropy:layout")
    by_rows = layouts is not None and layouts.dtype == torch.uint8 and bool((layouts >= len(_AXES)).any())
    return 3 if by_rows else 2


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
        if layout >= len(_AXES) ** 2 or (layout and len(shape) < 2):
            raise ValueError(
                f"entropy:layout of {name} is {layout}, which is none of a tensor of {len(shape)} dimensions"
            )
    if (weights := sum(math.prod(shape) for shape in shapes.values())) > MOST_CODES_PER_BYTE * (size + 8):
        raise ValueError(f"{weights} weights, more than {size} bytes of codes can stand for")
