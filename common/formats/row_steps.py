"""Steps by rows: a tensor's own step times a power of two for each row (output channel), in 32nds of an octave.

An array of them has the dimensions of its weight, all of length 1 but that of the rows, so that it can be multiplied
with the weight's codes.
"""

import numpy as np

PARTS = 32  # of an octave, which exponents count; with 8, steps up to 4% off raised the error of a 20x file by half
LARGEST_EXPONENT = 16 * PARTS  # up or down
_FRACTIONS = np.exp2(np.arange(PARTS) / PARTS).astype(np.float32)


def row_axis(step: float | np.ndarray) -> int | None:
    """The dimension of rows, the only one that is not of length 1; None: one step is that of all."""
    shape = np.shape(step)
    return next((axis for axis, length in enumerate(shape) if length > 1), None)


def parts(step: float | np.ndarray) -> tuple[float, np.ndarray]:
    """The step that is the tensor's own, that of the (lower) median row, and the exponents (R,), int64, by which those
    of the rows are nearest to 2^(exponent / PARTS) times that; of a step for all, itself and zeros."""
    steps = np.asarray(step, np.float32).ravel()
    own = np.sort(steps)[(len(steps) - 1) // 2]
    exponents = np.rint(PARTS * np.log2(steps.astype(np.float64) / float(own)))
    return float(own), exponents.clip(-LARGEST_EXPONENT, LARGEST_EXPONENT).astype(np.int64)


def join(name: str, own: np.float32, exponents: np.ndarray, axis: int, dimensions: int) -> np.ndarray:
    """Float32: the steps of which these are the `parts`. Raises ValueError, which says `name`, where they cannot be."""
    if (largest := abs(exponents).max()) > LARGEST_EXPONENT:
        raise ValueError(f"{name} has an exponent of {largest}, which is more than {LARGEST_EXPONENT}")
    with np.errstate(over="ignore", under="ignore"):
        steps = np.ldexp(np.float32(own) * _FRACTIONS[exponents % PARTS], exponents // PARTS)
    if not (np.isfinite(steps) & (steps > 0)).all():
        raise ValueError(f"the steps of {name} are not all positive numbers")
    return steps.reshape([-1 if i == axis else 1 for i in range(dimensions)])


def stored_steps(step: float | np.ndarray) -> float | np.ndarray:
    """What a file can say of a step: itself, float32; or the nearest of steps by rows that `parts` can tell."""
    if (axis := row_axis(step)) is None:
        return np.float32(np.asarray(step).reshape(()))
    own, exponents = parts(step)
    return join("a weight", own, exponents, axis, np.ndim(step))
