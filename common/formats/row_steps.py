"""Steps by rows: a base step times 2^(e / PARTS) for each row (output channel) of a weight, with integers e.

An array of them has the dimensions of its weight, all of length 1 but that of the rows, so that it can be multiplied
with the weight's codes.
"""

import numpy as np

from common.formats.numbers import along

Step = float | np.ndarray  # of all of a tensor, or an array of one for each row

PARTS = 32  # of an octave; with 8, steps were up to 4% off, which raised the error of a 20x file by half
LARGEST_EXPONENT = 16 * PARTS  # up or down
_FRACTIONS = np.exp2(np.arange(PARTS) / PARTS).astype(np.float32)


def row_axis(step: Step) -> int | None:
    """The dimension of rows, the only one that is not of length 1; None: one step is that of all."""
    shape = np.shape(step)
    return next((axis for axis, length in enumerate(shape) if length > 1), None)


def parts(step: Step) -> tuple[float, np.ndarray]:
    """(base, exponents): the step of the (lower) median row, and for each row the integer e, int64, for which
    base 2^(e / PARTS) is nearest to its step. Of one step for all: itself and 0.

    Raises ValueError where a step is not positive and finite, or LARGEST_EXPONENT cannot tell it.
    """
    steps = _positive(np.asarray(step, np.float32).ravel())
    base = _median(steps)
    exponents = np.rint(PARTS * np.log2(steps.astype(np.float64) / base)).astype(np.int64)
    if (largest := abs(exponents).max()) > LARGEST_EXPONENT:
        raise ValueError(f"steps that differ by 2^({largest} / {PARTS}) are too far apart")
    return base, exponents


def join(base: float, exponents: np.ndarray, axis: int, dimensions: int) -> np.ndarray:
    """The inverse of `parts`: steps by rows, float32, which are dimension `axis` of so many. Raises ValueError where an
    exponent is beyond LARGEST_EXPONENT, or a step not positive and finite."""
    if (largest := abs(exponents).max()) > LARGEST_EXPONENT:
        raise ValueError(f"an exponent of {largest} is more than {LARGEST_EXPONENT}")
    with np.errstate(over="ignore", under="ignore"):
        steps = np.ldexp(np.float32(base) * _FRACTIONS[exponents % PARTS], exponents // PARTS)
    return along(_positive(steps), axis, dimensions)


def stored_steps(step: Step) -> Step:
    """What a file can say of a step: itself, float32; or the nearest of steps by rows that `parts` can tell. Raises
    ValueError where one is not positive and finite."""
    steps = _positive(np.asarray(step, np.float32))
    if (axis := row_axis(steps)) is None:
        return steps.ravel()[0]
    base, farthest = _median(steps.ravel()), 2.0 ** (LARGEST_EXPONENT // PARTS)
    return join(*parts(steps.clip(base / farthest, base * farthest)), axis, steps.ndim)


def _median(steps: np.ndarray) -> float:
    """The lower one of (R,)."""
    return float(np.sort(steps)[(len(steps) - 1) // 2])


def _positive(steps: np.ndarray) -> np.ndarray:
    """The same. Raises ValueError where one is not positive and finite."""
    for step in (steps.min(), steps.max()):
        if not 0 < step < np.inf:
            raise ValueError(f"a step of {step} is not positive and finite")
    return steps
