"""Which integers stand for weights: the nearest multiples of a step, or others whose fewer bits pay for their error."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from common.choose.feedback import Feedback, no_feedback
from common.formats import entropy
from common.formats.entropy import LARGEST_CODE
from common.formats.row_steps import Step, row_axis, stored_steps
from common.formats.trellis import NO_TRELLIS, TRELLIS, columns_of, multiples, of_columns

# Steps proportional to 1 / sqrt(F) spend squared error F step^2 / 12 for entropy -log2(step); this is the price of a
# bit in units of F step^2 at which both move together.
PRICE_OF_A_BIT = np.log(2) / 6
# The same for a trellis, whose multiples lie twice as densely and whose errors are smaller: the best of some at 2 bits.
TRELLIS_PRICE = 0.4
TRELLIS_STEP = 0.6  # of a trellis, where 1 is that of a quantizer without one that takes about as many bits
FEWEST_ROWS = 8  # of a column down which a trellis runs: it begins in a state that allows one quantizer alone
FEEDBACK_REACH = 2**16  # codes beyond it are of steps so fine that they are rounded entry by entry
TABLED_REACH = 2**10  # lengths of codes up to it are looked up


@dataclass(frozen=True)
class Rounding:
    """How weights become integers. feedback: of the weights that are rounded by it; price: of a bit, in squared steps
    of a quantizer without a trellis (0: the nearest); trellis: whether weights of two dimensions or more have one."""

    feedback: dict[str, Feedback] = field(default_factory=dict)
    price: float = PRICE_OF_A_BIT
    trellis: bool = False

    def axis(self, name: str, shape: torch.Size) -> int | None:
        """The dimension of a weight down which its trellis runs: that of output channels, or the first of one without
        feedback; None: it has none."""
        axis = 1 if name in self.feedback and self.feedback[name].transposed else 0
        return axis if self.trellis and len(shape) > 1 and shape[axis] >= FEWEST_ROWS else None

    def relative_step(self, name: str, shape: torch.Size) -> float:
        """The step of a weight where 1 is that of one without a trellis."""
        return 1.0 if self.axis(name, shape) is None else TRELLIS_STEP


def encode(
    weights: dict[str, torch.Tensor],
    steps: dict[str, Step],
    feedback: dict[str, Feedback] | None = None,
    price: float = PRICE_OF_A_BIT,
    trellis: bool = False,
) -> dict[str, torch.Tensor]:
    """What a file stores of `weights`, as `choose_codes` rounds them to multiples of the steps that a file can say
    (`row_steps.stored_steps`)."""
    rounding = Rounding(feedback or {}, price, trellis)
    steps = {name: stored_steps(steps[name]) for name in weights}
    return store(choose_codes(weights, steps, rounding), steps, rounding)


def store(codes: dict[str, np.ndarray], steps: dict[str, Step], rounding: Rounding) -> dict[str, torch.Tensor]:
    """What a file stores of these codes and of steps that it can say."""
    axes = {name: rounding.axis(name, of_tensor.shape) for name, of_tensor in codes.items()}
    return entropy.encode(codes, steps, axes)


def decoded(codes: np.ndarray, step: Step, axis: int | None) -> np.ndarray:
    """The weight, float32, that `codes` stand for; axis: that of its trellis."""
    if axis is None:
        return np.asarray(codes.astype(np.float32) * step)
    columns = multiples(columns_of(codes.astype(np.int32), axis), TRELLIS)
    return of_columns(columns, codes.shape, axis).astype(np.float32) * step


def choose_codes(weights: dict[str, torch.Tensor], steps: dict[str, Step], rounding: Rounding) -> dict[str, np.ndarray]:
    """Integers, int64 of the weights' shapes, that stand for multiples of their steps near `weights`.

    Where another code is so much shorter that it pays for its error, it is taken. Raises ValueError for a step so small
    that codes pass LARGEST_CODE.
    """
    by_rows = {name for name in rounding.feedback.keys() & steps.keys() if row_axis(steps[name]) is not None}
    in_steps = {name: rounding.feedback[name].with_scales(np.ravel(steps[name])) for name in by_rows}
    rounding = replace(rounding, feedback=rounding.feedback | in_steps)

    def choose(name: str) -> np.ndarray:
        return _choose(weights[name].shape, _scaled(weights[name], steps[name]), rounding, name)

    big = [name for name, weight in weights.items() if weight.dim() > 1]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # compiled loops leave the interpreter to the others
        chosen = dict(zip(big, pool.map(choose, big), strict=True))
    if small := [name for name in weights if name not in chosen]:  # too few entries for statistics of their own
        scaled = [_scaled(weights[name], steps[name]).ravel() for name in small]
        together = _choose(torch.Size([sum(map(len, scaled)), 1]), np.concatenate(scaled)[:, None], rounding)
        parts = np.split(together.ravel(), np.cumsum([len(part) for part in scaled])[:-1])
        chosen |= {name: part.reshape(weights[name].shape) for name, part in zip(small, parts, strict=True)}
    return {name: chosen[name] for name in weights}


def _scaled(weight: torch.Tensor, step: Step) -> np.ndarray:
    """The weight in units of its steps."""
    scaled = weight.detach().cpu().double().numpy() / np.asarray(step, np.float64)
    if not abs(scaled).max() <= LARGEST_CODE:
        raise ValueError(f"steps from {np.min(step):.3g} are too small for weights up to {weight.abs().max():.3g}")
    return scaled


def _choose(shape: torch.Size, scaled: np.ndarray, rounding: Rounding, name: str = "", rounds: int = 3) -> np.ndarray:
    """Integers near `scaled`, a weight of `shape` in units of its step."""
    axis = rounding.axis(name, shape) if name else None
    feedback = rounding.feedback.get(name)
    if feedback is None or abs(scaled).max() >= FEEDBACK_REACH:
        feedback = no_feedback(shape, axis == 1)
    next_state, price = (NO_TRELLIS, 1.0) if axis is None else (TRELLIS, TRELLIS_PRICE / PRICE_OF_A_BIT)
    rows = feedback.rows(torch.from_numpy(scaled)).numpy()
    codes = np.rint(scaled / (1 if axis is None else 2)).astype(np.int64)
    for left in reversed(range(rounds if rounding.price else 1)):  # feedback by rows, which takes long, in the last
        by = replace(feedback, by_rows=None) if left else feedback
        bits = code_lengths(columns_of(codes, axis or 0), next_state)
        found = by.round(rows, bits, rounding.price * price, LARGEST_CODE, next_state)
        codes = np.ascontiguousarray(feedback.weight(found, shape))
    return codes


def code_lengths(codes: np.ndarray, next_state: np.ndarray) -> np.ndarray:
    """(quantizers, 2 n + 1): the bits that each code from -n to n would take beside `codes` (columns, rows), after each
    quantizer's own statistics; one that is not there takes as many as a fourth of one that is there once."""
    reach = min(TABLED_REACH, int(abs(codes).max()) + 8)
    tabled = codes.clip(-reach, reach) + reach
    quantizers = _quantizers(codes, next_state)
    lengths = []
    for quantizer in range(min(2, len(next_state))):
        counts = np.bincount(tabled[quantizers == quantizer], minlength=2 * reach + 1) + 0.25
        lengths.append(np.log2(counts.sum() / counts))
    return np.stack(lengths)


def _quantizers(codes: np.ndarray, next_state: np.ndarray) -> np.ndarray:
    """Which quantizer each of codes (columns, rows) belongs to."""
    states = np.zeros(codes.shape, np.int32)
    for r in range(1, codes.shape[1]):
        states[:, r] = next_state[states[:, r - 1], codes[:, r - 1] & 1]
    return states & 1
