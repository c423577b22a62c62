"""Formats and steps that fit a size: the smallest Fisher-weighted squared error at a given number of bytes.

What is minimised is the sum of F dw^2 over all entries, with dw the error of storing one: half of it, with the diagonal
of the Hessian for F, is LeCun et al. 1990, "Optimal Brain Damage", eq. 4. The empirical Fisher information is not the
Hessian of a mean of squared errors: F dw^2 ranks tensors, and is not the increase of the loss. With Gauss-Newton values
for F the sum is about that increase (common.fisher.gauss_newton). A factor common to all F changes no choice.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize, sparse

from common.choose import rounding
from common.choose.feedback import Feedback
from common.choose.fixed_rounding import FixedRounding
from common.errors import UserError
from common.formats import entropy
from common.formats.numbers import stored_bytes
from common.formats.row_steps import Step

SAMPLED = 20_000  # of a tensor's weights, for a first guess at its entropy
TOLERANCE = 5e-4  # of a file's size, below what was asked for
TRIES = 20
AGAIN_TOLERANCE, AGAIN_TRIES = 2e-3, 4  # of `fit_again`, one of whose tries takes about as long as a whole first fit
WIDTHS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp16", "fp32")


class BudgetError(ValueError):
    """A size that cannot be reached; `smallest` is the number of bytes that can, and `formats` those that reach it."""

    def __init__(self, smallest: int, formats: dict[str, str] | None = None):
        super().__init__(f"the smallest possible is {smallest} bytes")
        self.smallest, self.formats = smallest, formats

    def __reduce__(self):  # so that it is the same in another process
        return type(self), (self.smallest, self.formats)


def cheapest_formats(
    distortion: dict[str, dict[str, float]], sizes: dict[str, dict[str, int]], budget: int
) -> dict[str, str]:
    """The format of each tensor with the least total distortion in at most `budget` bytes, exactly.

    distortion, sizes: {tensor: {format: weighted squared error, or bytes}}. One binary variable for each choice, solved
    as a mixed-integer linear program (HiGHS). Raises BudgetError where no choice fits.
    """
    chosen = {name: min(formats, key=formats.get) for name, formats in sizes.items()}
    smallest = sum(sizes[name][fmt] for name, fmt in chosen.items())
    if smallest > budget:
        raise BudgetError(smallest, chosen)
    total = sum(distortion[name][fmt] for name, fmt in chosen.items())
    while total > 0:
        # The solver's tolerance is absolute, so distortions are put in units of the best total yet, which no single
        # one of the best choice can pass.
        within = {n: {f: d / total for f, d in formats.items() if d <= total} for n, formats in distortion.items()}
        chosen = _solve(within, sizes, budget)
        before, total = total, sum(distortion[name][fmt] for name, fmt in chosen.items())
        if total > before * (1 - 1e-6):
            break
    return chosen


def _solve(distortion, sizes, budget) -> dict[str, str]:
    choices = [(name, fmt) for name, formats in distortion.items() for fmt in formats]
    rows = {name: row for row, name in enumerate(distortion)}
    one_each = sparse.csr_array(
        (np.ones(len(choices)), ([rows[name] for name, _ in choices], np.arange(len(choices)))),
        shape=(len(rows), len(choices)),
    )
    result = optimize.milp(
        np.array([distortion[name][fmt] for name, fmt in choices]),
        integrality=np.ones(len(choices)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(np.array([[sizes[name][fmt] for name, fmt in choices]]), 0, budget),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    if result.x is None:
        raise RuntimeError(f"the solver gave up: {result.message}")
    return dict(choice for choice, taken in zip(choices, result.x, strict=True) if taken > 0.5)


def fixed_formats(
    weights: dict[str, torch.Tensor],
    axes: dict[str, int],
    values: dict[str, float],
    budget: int,
    errors: dict[str, dict[str, float]] | None = None,
) -> dict[str, str]:
    """The formats of FP32 `weights` with the least Fisher-weighted squared error in at most `budget` bytes.

    axes: the output-channel axis of each weight; values: its Fisher value; errors: `format_errors`, by default those of
    nearest rounding. 1-D tensors take fp16 or fp32. Raises BudgetError, and UserError where a value is not finite.
    """
    _require_finite(values)
    errors = format_errors(weights, axes, FixedRounding()) if errors is None else errors
    distortion = {name: {fmt: values[name] * e for fmt, e in errors[name].items()} for name in weights}
    sizes = {
        name: {fmt: stored_bytes(weight.shape, fmt, axes[name]) for fmt in errors[name]}
        for name, weight in weights.items()
    }
    return cheapest_formats(distortion, sizes, budget)


def format_errors(
    weights: dict[str, torch.Tensor], axes: dict[str, int], rounding: FixedRounding
) -> dict[str, dict[str, float]]:
    """{tensor: {format: squared error}} of the formats that each tensor can take."""
    return {
        name: {
            fmt: rounding.error(name, weight, fmt, axes[name]) for fmt in (WIDTHS if weight.dim() > 1 else WIDTHS[-2:])
        }
        for name, weight in weights.items()
    }


def entropy_coded(
    weights: dict[str, torch.Tensor],
    values: dict[str, float],
    size: Callable[[dict[str, torch.Tensor]], int],
    budget: int,
    feedback: dict[str, Feedback] | None = None,
    price: float = rounding.PRICE_OF_A_BIT,
    trellis: bool = False,
    ratios: dict[str, Step] | None = None,
) -> dict[str, torch.Tensor]:
    """`rounding.encode` of FP32 `weights` with steps by their Fisher `values`, in at most `budget` bytes.

    size: the bytes of what is stored; feedback: of the weights that are rounded by it; price: of a bit, in squared
    steps; trellis: whether weights are coded by one; ratios: of the steps of rows to the step of all, for weights that
    have steps by rows. At high resolution the least sum of F step^2 / 12 for its entropy has steps proportional to
    1 / sqrt(F), so one factor remains to be found. Tensors of value zero, which the loss does not reach, become zero.
    Raises BudgetError, and UserError where a value is not finite.
    """
    _require_finite(values)
    largest = {name: max(1e-30, float(weight.abs().max())) for name, weight in weights.items()}
    how = rounding.Rounding(feedback or {}, price, trellis)

    relative = {n: how.relative_step(n, w.shape) * (ratios or {}).get(n, 1.0) for n, w in weights.items()}

    def steps_of(factor: float) -> dict[str, Step]:
        steps = {}
        for name, w in largest.items():
            finest, all_zero = finest_step(w), 3 * w
            step = factor / values[name] ** 0.5 if values[name] > 0 else all_zero
            steps[name] = np.clip(step * relative[name], finest, all_zero)
        return steps

    def encode(factor: float) -> dict[str, torch.Tensor]:
        return rounding.encode(weights, steps_of(factor), how.feedback, price, trellis)

    coarsest = max(3 * w * values[name] ** 0.5 for name, w in largest.items())  # from here on every code is zero
    coarsest /= min(np.min(of_tensor) for of_tensor in relative.values())
    zeros = {name: np.zeros(tuple(weight.shape), np.int64) for name, weight in weights.items()}
    best = entropy.encode(zeros, steps_of(coarsest))
    if (smallest := size(best)) > budget:
        raise BudgetError(smallest)
    if coarsest == 0:  # the loss reaches none
        return best
    guess = _factor_of_entropy(weights, values, 8 * (budget - smallest), coarsest)
    return _fit(encode, size, budget, guess, coarsest) or best


def _factor_of_entropy(weights: dict[str, torch.Tensor], values: dict[str, float], bits: int, coarsest: float) -> float:
    """The factor at which the codes of the nearest multiples, of a share of the weights, have about these bits."""
    shares = {
        name: weight.detach().cpu().flatten()[:: 1 + weight.numel() // SAMPLED] for name, weight in weights.items()
    }

    def entropy_bits(factor: float) -> float:
        total = 0.0
        for name, share in shares.items():
            if not values[name] > 0:
                continue
            codes = (share * float(values[name] ** 0.5 / factor)).round().long().clamp(-(2**20), 2**20)
            counts = torch.unique(codes, return_counts=True)[1].double()
            total -= float((counts * (counts / counts.sum()).log2()).sum()) * weights[name].numel() / len(share)
        return total

    low, high = coarsest * 1e-9, coarsest
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy_bits(middle) > bits else (low, middle)
    return high


def _require_finite(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(
                f"the Fisher value of {name} is {value}, not a finite number of at least 0; measure it anew"
            )


def _fit(
    encode: Callable[[float], dict[str, torch.Tensor]],
    size: Callable[[dict[str, torch.Tensor]], int],
    budget: int,
    guess: float,
    highest: float,
    tolerance: float = TOLERANCE,
    tries: int = TRIES,
) -> dict[str, torch.Tensor] | None:
    """What the smallest argument of `encode`, up to `highest`, gives whose size fits, to within `tolerance` of the
    budget or a thousandth of a percent of the argument; None where none was found in so many `tries`.

    By secants of log size against log argument, from `guess`, within the bracket of what fits and what does not.
    """
    low, high, best, tried = 0.0, highest, None, []
    at = min(guess, highest)
    for _ in range(tries):
        stored = encode(at)
        found = size(stored)
        tried.append((math.log(at), math.log(found)))
        if found <= budget:
            high, best = at, stored
            if found >= (1 - tolerance) * budget:
                break
        else:
            low = at
        if low and high / low < 1 + 1e-5:
            break
        at = _next_try(tried, math.log((1 - tolerance / 2) * budget), low, high, bool(best))
    return best


def _next_try(tried: list[tuple[float, float]], goal: float, low: float, high: float, bracketed: bool) -> float:
    """Where the line through the last two of `tried` (log argument, log size) meets the goal; bisects where that leaves
    the bracket, or does not close it in a few tries."""
    slope = -0.6
    if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
        slope = min(-0.05, (tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0]))
    step = (goal - tried[-1][1]) / slope
    at = math.exp(tried[-1][0] + min(max(step, -2.0), 2.0))
    if not low:
        return min(at, high * 0.999)
    if not bracketed:
        return min(max(at, low * 1.0005), high)
    if len(tried) % 4 == 0 or not low < at < high:
        return (low * high) ** 0.5
    return at


def finest_step(largest: float) -> float:
    """The least step, of a tensor whose weights reach `largest`, whose codes a file can hold."""
    return 1.01 * largest / entropy.LARGEST_CODE


def fit_again(
    encode: Callable[[float], dict[str, torch.Tensor]], size: Callable[[dict[str, torch.Tensor]], int], budget: int
) -> dict[str, torch.Tensor] | None:
    """What `encode` gives for about the smallest factor, near 1, of steps that were fitted in another way, with which
    it keeps to `budget` bytes; None where a few tries did not find one."""
    return _fit(encode, size, budget, 1.0, 2.0, AGAIN_TOLERANCE, AGAIN_TRIES)


def requantize_to_size(
    weights: dict[str, torch.Tensor],
    steps: dict[str, Step],
    size: Callable[[dict[str, torch.Tensor]], int],
    budget: int,
) -> dict[str, torch.Tensor]:
    """`rounding.encode` of `weights` with these steps at the lowest price of a bit that keeps to `budget` bytes; where
    no price does, with steps that are larger by the least factor.

    Raises BudgetError where no factor does.
    """

    def priced(price: float) -> dict[str, torch.Tensor]:
        return rounding.encode(weights, steps, price=price)

    def coarser(factor: float) -> dict[str, torch.Tensor]:
        return rounding.encode(weights, {name: factor * step for name, step in steps.items()})

    best = priced(0.0)
    if size(best) <= budget:
        return best
    highest = 1e3
    best = priced(highest)
    if size(best) <= budget:
        return _finest(priced, size, budget, 1e-3, highest, 0.01) or best
    coarsest = 3 * max(1.0, *(float(np.abs(w.numpy() / steps[name]).max()) for name, w in weights.items()))
    best = coarser(coarsest)  # all zero
    if (smallest := size(best)) > budget:
        raise BudgetError(smallest)
    return _finest(coarser, size, budget, 1.0, coarsest, 1e-4) or best


def _finest(
    encode: Callable[[float], dict[str, torch.Tensor]],
    size: Callable[[dict[str, torch.Tensor]], int],
    budget: int,
    low: float,
    high: float,
    tolerance: float,
) -> dict[str, torch.Tensor] | None:
    """What the smallest argument of `encode` in low..high, to within a factor of 1 + `tolerance`, gives whose size
    fits; None where nothing below `high` fits."""
    best = None
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        stored = encode(middle)
        if size(stored) <= budget:
            high, best = middle, stored
        else:
            low = middle
    return best


def shrink(values: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Fisher values (T,) with standard errors (T,), pulled toward their geometric mean where they are uncertain.

    The posterior mean of log F for a normal prior whose mean and variance are those of all tensors' log F, less the
    variance that the errors explain (empirical Bayes; Efron & Morris 1975). A value of zero counts as the least other.
    Raises UserError where all are zero or any is not finite.
    """
    positive = values[values > 0]
    if not (values.isfinite() & errors.isfinite()).all():
        raise UserError("Fisher values are not finite: the network's weights or its loss are too large; train it anew")
    if not len(positive):
        raise UserError("all Fisher values are zero: the loss depends on none of the weights; train the network first")
    if len(values) == 1:
        return values
    relative = torch.where(values > 0, errors / values.clamp(min=1e-300), torch.ones_like(values))
    logs, variance = values.clamp(min=positive.min()).log(), relative.square()
    prior = (logs.var() - variance.mean()).clamp(min=1e-12)
    return (logs.mean() + (logs - logs.mean()) * prior / (prior + variance)).exp()
