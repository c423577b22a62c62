"""The search for the smallest file that costs little: what is little, where it ends, what it says."""

import math
from collections.abc import Callable

from common.metrics.estimate import Estimate
from common.study.rows import Figure

START, STRIDE, RESOLUTION = 16.0, 1.25, 1.06  # of the search for a factor
START_FINETUNED = 24.0  # where each try is finetuned


def margin_of(reference: Estimate, share: float) -> float:
    """The cost that is accepted: a share of the baseline's unbiased FID, its distance to the real digits.

    Where that figure is below its own error, as chance makes it where the baseline is as good as the images can tell,
    the error takes its place: a distance that might be there. So the margin is always positive.
    """
    return share * max(reference.value, reference.error)


def lies_below(difference: Figure, margin: float) -> bool:
    """Whether the difference and two standard errors more are less than the margin."""
    return difference.value + 2 * difference.error < margin


def search(acceptable: Callable[[float], bool], most: float, start: float = START) -> tuple[float | None, float | None]:
    """The largest factor found acceptable, and the smallest that is larger and is not; None where none was found.

    Walks from `start` in strides to where acceptable(times) changes, then halves the last stride until `RESOLUTION`.
    Factors lie in 1..`most`, the largest of which is tried where all below are acceptable.
    """
    low = high = None
    largest = math.floor(10 * most) / 10
    times = min(start, largest)
    while times >= 1:
        if acceptable(times):
            low = times
        else:
            high = times
        if low is None:
            times = float(f"{high / STRIDE:.3g}")
        elif high is None and low < largest:
            times = min(float(f"{low * STRIDE:.3g}"), largest)
        elif high is None:
            break
        elif high / low > RESOLUTION:
            times = float(f"{(low * high) ** 0.5:.3g}")
        else:
            break
    return low, high


def describe_search(low: float | None, high: float | None, tried: list[float], margin: float) -> str:
    rule = f"less than the margin of {margin:.4f} (unbiased FID minus FP32's, two standard errors included)"
    if low is None:
        factors = ", ".join(f"{times:g}" for times in sorted(tried))
        return f"no factor that was tried, {factors}, costs {rule}"
    further = "nothing larger was tried" if high is None else f"the next tried, {high:g}, may cost more"
    return f"largest factor that costs {rule}: {low:g}; {further}"


def describe_confirmation(times: float, difference: Figure, margin: float, first: int, seeds: int) -> str:
    used = f"seed {first}" if seeds == 1 else f"seeds {first} to {first + seeds - 1}"
    holds = "holds there too" if lies_below(difference, margin) else "does not hold there"
    return (
        f"on noise that took no part in the search, {used}: {times:g} costs {difference.text(4)}, "
        f"margin {margin:.4f}; it {holds}"
    )
