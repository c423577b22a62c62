"""Frechet distances of images' features to those of real digits, with their standard errors.

`fid` is the distance as it is computed everywhere, of the moments of N images. Most of it is bias: moments of few
images lie away from the model's own, in whichever direction, so that it falls as 1 / N (Chong and Forsyth 2020).
`fid_unbiased` estimates what it would be of infinitely many images of the model. The digits are held fixed in both.
"""

from dataclasses import dataclass

import numpy as np

from common.metrics.estimate import Estimate
from common.metrics.spectrum import root_trace

CHUNK = 500  # images at once, so that memory beyond their features does not grow with their number
GROUPS = 10  # of images, each left out once; more cost more, and take little from the error
NEGLIGIBLE = 1e-12  # of the largest eigenvalue


@dataclass(frozen=True)
class Reference:
    """Statistics of the real digits: mean (D,), covariance (D, D) and its square root, a sample (M, D) for KID."""

    mean: np.ndarray
    covariance: np.ndarray
    covariance_root: np.ndarray
    sample: np.ndarray
    kernel_mean: float  # over the pairs of different digits of `sample`


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The positive semidefinite square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def fid(features: np.ndarray, reference: Reference) -> Estimate:
    """Squared Frechet distance of features (N, D) to the reference, as of two Gaussians (Heusel et al. 2017, eq. 6),
    covariances with N - 1 as in pytorch-fid. The trace of (C1 C2)^(1/2) is that of the symmetric
    (C1^(1/2) C2 C1^(1/2))^(1/2), so eigenvalues do.

    Influence of image x: 2 (m - m_r).(x - m) + (x - m)'(1 - G)(x - m), less its mean, where 1 - G is the derivative in
    the covariance C: G = R M^(-1/2) R with R the root of the reference's covariance and M = R C R.
    """
    mean, covariance = moments(features)
    root = reference.covariance_root
    values, vectors = np.linalg.eigh(root @ covariance @ root)
    kept = values > values[-1] * NEGLIGIBLE
    shift = mean - reference.mean
    overlap = np.sqrt(values[kept]).sum()
    value = shift @ shift + np.trace(covariance) + np.trace(reference.covariance) - 2 * overlap

    scaled_root = root @ vectors[:, kept] / values[kept] ** 0.25
    influence = np.empty(len(features))
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        quadratic = (centred**2).sum(1) - ((centred @ scaled_root) ** 2).sum(1)
        influence[start : start + CHUNK] = 2 * centred @ shift + quadratic
    return Estimate(float(value), influence - influence.mean())


def fid_unbiased(features: np.ndarray, reference: Reference) -> Estimate:
    """Frechet distance to the reference of the distribution that features (N, D) were drawn from; may be negative.

    1. The squared distance of the means is that over pairs of different images, and `root_trace` takes the place of the
       sum of roots: without bias for Gaussian features, and nearly so for fewer images than D.
    2. What heavier tails add to the bias falls as 1 / N too. The jackknife takes it away (Quenouille 1956): with k
       groups, k times the estimate less k - 1 times the mean of those that leave a group out. Groups follow from a
       fixed permutation of the images' indices, so they are the same for two models of the same noise.

    Measured over draws of 300 images, 256 features with the covariance of digits': `fid` lies 0.16 too high, this
    0.000 ± 0.001 for Gaussian features and 0.007 ± 0.001 too low for digits' own, where a draw is off by 0.014.

    The influence of an image is the same combination of the derivatives of all k + 1 estimates in its weight. How far
    the derivatives at an image differ between them tells how much images contribute together, which is all there is
    where the distance is zero.
    """
    images, centre = len(features), features.mean(0, dtype=np.float64)
    group = np.empty(images, np.int64)
    group[np.random.default_rng(0).permutation(images)] = np.arange(images) % GROUPS
    parts = [_sums(features[group == k], centre, reference.covariance_root) for k in range(GROUPS)]
    sums = [sum(of_parts) for of_parts in zip(*parts, strict=True)]
    overlap = _overlap(sums, reference.covariance_root)
    dimensions = len(overlap[0])
    value, whole = _without_gaussian_bias(features, sums, centre, reference, overlap, dimensions)
    value, influence, doubled = GROUPS * value, GROUPS * whole, np.zeros((GROUPS, images))
    share = (GROUPS - 1) / GROUPS
    for k, part in enumerate(parts):
        left = np.flatnonzero(group != k)
        rest = [whole - its for whole, its in zip(sums, part, strict=True)]
        overlap = _overlap(rest, reference.covariance_root)
        without, of_left = _without_gaussian_bias(features[left], rest, centre, reference, overlap, dimensions)
        value -= share * without
        influence[left] -= share * images / len(left) * of_left
        moved = of_left - whole[left]
        doubled[k, left] = (moved - moved.mean()) / np.sqrt(2 * share)
    return Estimate(float(value), influence - influence.mean(), doubled)


def _sums(features: np.ndarray, centre: np.ndarray, root: np.ndarray) -> tuple[int, np.ndarray, float, np.ndarray]:
    """The number of features, and of what they are less `centre` the sum (D,), the sum of squares, and the sum of
    products (D, D) after the `root` of the reference's covariance."""
    total, square, products = np.zeros(len(centre)), 0.0, np.zeros_like(root)
    for start in range(0, len(features), CHUNK):
        shifted = features[start : start + CHUNK] - centre
        rooted = shifted @ root
        total, square, products = total + shifted.sum(0), square + (shifted**2).sum(), products + rooted.T @ rooted
    return len(features), total, square, products


def _overlap(sums, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors (as columns) of M = R C R, those alone that are not negligible."""
    count, total, _, products = sums
    rooted = total @ root
    values, vectors = np.linalg.eigh((products - np.outer(rooted, rooted) / count) / (count - 1))
    kept = values > values[-1] * NEGLIGIBLE
    return values[kept][-(count - 1) :], vectors[:, kept][:, -(count - 1) :]


def _without_gaussian_bias(
    features: np.ndarray, sums, centre: np.ndarray, reference: Reference, spectrum, dimensions: int
) -> tuple[float, np.ndarray]:
    """The first step of `fid_unbiased`, of features (N, D) whose `_sums` are given, and `spectrum`, their `_overlap`;
    and the influence of each."""
    count, total, square, _ = sums
    mean = centre + total / count
    shift = mean - reference.mean
    trace = (square - total @ total / count) / (count - 1)
    values, vectors = spectrum
    overlap, derivative = root_trace(values, count - 1, dimensions)
    value = shift @ shift - trace / count + trace + np.trace(reference.covariance) - 2 * overlap

    rooted = reference.covariance_root @ vectors
    influence = np.empty(count)
    for start in range(0, count, CHUNK):
        centred = features[start : start + CHUNK] - mean
        quadratic = (1 - 1 / count) * (centred**2).sum(1) - (centred @ rooted) ** 2 @ (2 * derivative)
        influence[start : start + CHUNK] = 2 * centred @ shift + quadratic
    return value, influence - influence.mean()


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), with N - 1, of features (N, D), in float64."""
    mean, scatter = features.mean(0, dtype=np.float64), 0.0
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        scatter = scatter + centred.T @ centred
    return mean, scatter / (len(features) - 1)
