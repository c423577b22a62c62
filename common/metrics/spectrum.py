"""The trace of the square root of a covariance, from the eigenvalues of a sample covariance, without their bias.

Sample eigenvalues are spread wider than those of the population, so the roots of them sum to too little: with n degrees
of freedom and D dimensions by about the share D / 8n. For D and n that grow together their spread is known exactly
(Marchenko and Pastur 1967), and a sum over the population's eigenvalues is a contour integral of the sample's Stieltjes
transform (Mestre 2008). For the root it becomes an integral along the real axis (Tiomoko and Couillet 2019, "Random
matrix-improved estimation of the Wasserstein distance between two centered Gaussian distributions", whose first
covariance is known here).
"""

import numpy as np

NODES = 32  # of the quadrature in each interval
LEAST_GAP = 0.02  # between eigenvalues l, of l / n
NEAR = 0.05  # eigenvalues nearer than this share of the interval below them are as good as equal
HALVINGS = 52  # of the intervals in which the zeros lie: to the precision of float64


def root_trace(eigenvalues: np.ndarray, freedom: int, dimensions: int) -> tuple[float, np.ndarray]:
    """tr C^(1/2) of a population's covariance C of rank `dimensions`, and its derivatives by the `eigenvalues` (K,) of
    a sample covariance with `freedom` n degrees of freedom. They are positive and ascend; K is at most n.

    With m(x) = sum_j 1 / (n (l_j - x)) - (1 - K / n) / x of the eigenvalues l_j, and z_i the zero of m below l_i,
    the trace is (2 n / pi) sum_i of the integral of m^(1/2) from z_i to l_i.

    Where n < dimensions the contour stops at zero, for `_beyond_zero` to continue.
    """
    n, count = freedom, len(eigenvalues)
    values = _apart(np.asarray(eigenvalues, np.float64), n)
    short = count == n < dimensions
    width = _distance_to_zeros(values, n, to_zero=short)
    distance = values - values[:, None]  # (i, j): l_j - l_i
    trace, derivative = 0.0, np.zeros(count)
    for angle in (np.arange(NODES) + 0.5) * np.pi / (2 * NODES):
        # x = l - width cos^2: its density takes the root's singularities at both ends into the weight sin 2 angle.
        below = width * np.cos(angle) ** 2
        x = values - below
        inverse = 1 / (distance + below[:, None])
        root = np.sqrt((inverse.sum(1) / n - (1 - count / n) / x).clip(1e-300))
        weight = n / NODES * np.sin(2 * angle)
        trace += weight * (width * root).sum()
        # The zeros may be held: the integrand vanishes there.
        inverse *= inverse
        slope = inverse.sum(1) / n + (1 - count / n) / x**2
        pull = width / (2 * root)
        derivative += weight * (root + pull * slope * np.sin(angle) ** 2 - pull @ inverse / n)
    for i in np.flatnonzero(
        np.diff(values) < NEAR * width[:-1]
    ):  # the quadrature does not tell them apart, nor need it
        derivative[i : i + 2] = derivative[i : i + 2].mean()
    if short:
        more, slopes = _beyond_zero(values, n, dimensions)
        trace, derivative = trace + more, derivative + slopes
    return float(trace), derivative


def _apart(values: np.ndarray, n: int) -> np.ndarray:
    """Eigenvalues of which no two are equal, or so near that the quadrature would have to be finer."""
    least = LEAST_GAP / n * values
    return values + least * np.cumsum(np.diff(values, prepend=0.0) < least)


def _distance_to_zeros(values: np.ndarray, n: int, to_zero: bool) -> np.ndarray:
    """(K,): how far below each eigenvalue the next zero of m lies; the zeros are those of sum_j l_j / (l_j - x) = n.
    The lowest interval reaches to 0 where `to_zero`."""
    low, high = np.zeros_like(values), np.diff(values, prepend=0.0)
    distance = values - values[:, None]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = (values / (distance + middle[:, None])).sum(1) > n  # the zero lies further down
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    if to_zero:
        high[0] = values[0]
    return high


def _beyond_zero(values: np.ndarray, n: int, dimensions: int) -> tuple[float, np.ndarray]:
    """What the contour leaves out where n < dimensions D, and its derivatives.

    The sample tells the population's Stieltjes transform at -s for s of at least w = 1 / m(0) alone; below, it is
    continued by the power of s that it follows at w, whose exponent is r - 1 with r = m^2 / ((D / n - 1) m').
    """
    mean, square = (1 / values).mean(), (1 / values**2).mean()
    of_mean, of_square = -1 / values**2 / n, -2 / values**3 / n
    r = mean**2 / ((dimensions / n - 1) * square)
    of_r = r * (2 * of_mean / mean - of_square / square)
    if r > 1:  # by chance alone
        r, of_r = 1.0, np.zeros_like(values)
    scale, factor = (dimensions - n) / np.pi * mean**-0.5, 2 - 1 / (0.5 + r)
    return scale * factor, scale * (of_r / (0.5 + r) ** 2 - factor * of_mean / (2 * mean))
