"""A value with its standard error, and how those of several draws or of two models go together.

Errors are those of drawing other generated images from the same model. They come from influence functions (the
infinitesimal jackknife; Efron 1982): each statistic is, to first order, a mean over images, and the spread of the
images' contributions gives its standard error. Two models sampled from the same noise share their images' luck, so the
error of their difference is that of the paired contributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A value and what each image contributes to its deviation: influence (N,), mean zero.

    The spread of `influence` counts twice what two images contribute together (Efron and Stein 1981). doubled (K, N),
    where that was measured: the sum of squares over K, averaged over images, is the variance that is counted once too
    often. Both are linear, so those of a difference are the differences.
    """

    value: float
    influence: np.ndarray
    doubled: np.ndarray | None = None

    @property
    def error(self) -> float:
        """Standard error of the value."""
        return standard_error(self.influence, self.doubled)

    def minus(self, other: "Estimate") -> tuple[float, float]:
        """The difference to `other`, whose image i started from the same noise, and its standard error."""
        doubled = None if self.doubled is None else self.doubled - other.doubled
        return self.value - other.value, standard_error(self.influence - other.influence, doubled)


def standard_error(influence: np.ndarray, doubled: np.ndarray | None = None) -> float:
    """Standard deviation of influence (N,) over sqrt(N); less the variance that is counted twice, which is half of all
    at most, where `doubled` (K, N) is given."""
    variance = influence.var(ddof=1)
    if doubled is not None:
        variance -= min((doubled**2).sum(0).mean(), variance / 2)
    return float(np.sqrt(variance / len(influence)))


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates of draws of equally many images."""
    value = sum(estimate.value for estimate in estimates) / len(estimates)
    doubled = None
    if estimates[0].doubled is not None:
        doubled = np.concatenate([estimate.doubled for estimate in estimates], axis=1)
    return Estimate(value, np.concatenate([estimate.influence for estimate in estimates]), doubled)
