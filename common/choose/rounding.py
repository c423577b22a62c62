"""Which integers stand for weights: the nearest multiples of a step, or others whose fewer bits pay for their error."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common.choose.feedback import Feedback, toward_zero
from common.formats import entropy
from common.formats.entropy import LARGEST_CODE, Group, code_lengths, groups_of

# Steps proportional to 1 / sqrt(F) spend squared error F step^2 / 12 for entropy -log2(step); this is the price of a
# bit in units of F step^2 at which both move together.
PRICE_OF_A_BIT = np.log(2) / 6
FEEDBACK_REACH = 2**16  # codes beyond it are of steps so fine that they are rounded entry by entry


def encode(
    weights: dict[str, torch.Tensor],
    steps: dict[str, float],
    feedback: dict[str, Feedback] | None = None,
    price: float = PRICE_OF_A_BIT,
) -> dict[str, torch.Tensor]:
    """What a file stores of `weights`, as `choose_codes` rounds them."""
    return entropy.encode(choose_codes(weights, steps, feedback, price), steps)


def choose_codes(
    weights: dict[str, torch.Tensor],
    steps: dict[str, float],
    feedback: dict[str, Feedback] | None = None,
    price: float = PRICE_OF_A_BIT,
) -> dict[str, np.ndarray]:
    """Integers, int64 of the weights' shapes, that times their steps are near `weights`.

    Where the next code toward zero is so much shorter that it pays for its error, it is taken, at the `price` of a bit
    in squared steps. Weights that have `feedback` are rounded by it, the others entry by entry.
    Raises ValueError for a step that is not positive or so small that codes pass LARGEST_CODE.
    """
    feedback = feedback or {}
    groups = groups_of({name: weight.shape for name, weight in weights.items()})

    def choose(group: Group) -> list[np.ndarray]:
        scaled = np.concatenate([_scaled(weights[name], np.float32(steps[name])) for name in group.names])
        codes = _choose_codes(scaled, price)
        if (rounding := feedback.get(group.names[0])) is not None and abs(codes).max() < FEEDBACK_REACH:
            codes = _choose_with_feedback(weights[group.names[0]].shape, scaled, codes, rounding, price)
        return np.split(codes, np.cumsum(group.sizes)[:-1])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy's loops leave the interpreter to the others
        chosen = {
            name: part
            for group, parts in zip(groups, pool.map(choose, groups), strict=True)
            for name, part in zip(group.names, parts, strict=True)
        }
    return {name: chosen[name].reshape(weight.shape) for name, weight in weights.items()}


def _scaled(weight: torch.Tensor, step: np.float32) -> np.ndarray:
    if not step > 0:
        raise ValueError(f"a step of {step} is not positive")
    scaled = weight.detach().cpu().double().numpy().ravel() / float(step)
    if not abs(scaled).max() <= LARGEST_CODE:
        raise ValueError(f"a step of {step} is too small for a weight of {weight.abs().max():.3g}")
    return scaled


def _choose_codes(scaled: np.ndarray, price: float, rounds: int = 3) -> np.ndarray:
    """Integers near `scaled`, entry by entry."""
    codes = np.rint(scaled).astype(np.int64)
    for _ in range(rounds):
        before, codes = codes, toward_zero(scaled, codes, code_lengths(codes), price)
        if np.array_equal(codes, before):  # and so would be the next
            break
    return codes


def _choose_with_feedback(
    shape: torch.Size, scaled: np.ndarray, codes: np.ndarray, feedback: Feedback, price: float, rounds: int = 2
) -> np.ndarray:
    """Integers near `scaled` (entries of a weight of `shape`), by feedback; `codes`: those chosen entry by entry."""
    rows = feedback.rows(torch.from_numpy(scaled).reshape(shape)).numpy()
    for _ in range(rounds):
        codes = feedback.round(rows, code_lengths(codes.ravel()), price)
    return np.ascontiguousarray(feedback.weight(codes, shape)).ravel()
