"""FID, KID and Inception-style score of images, and PSNR between two models', each with its standard error.

Errors are those of drawing other generated images from the same model; the reference digits are held fixed. They come
from influence functions (the infinitesimal jackknife; Efron 1982): each statistic is, to first order, a mean over
images, and the spread of the images' contributions gives its standard error. Two models sampled from the same noise
share their images' luck, so the error of their difference is that of the paired contributions.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.errors import UserError
from common.runtime import distributed, sealed

CHUNK = 500  # images at once, so that memory beyond their features does not grow with their number
KID_REFERENCE = 5_000  # digits at most; the kernel's cost grows with the square


@dataclass(frozen=True)
class Estimate:
    """A value and what each image contributes to its deviation: influence (N,), mean zero."""

    value: float
    influence: np.ndarray

    @property
    def error(self) -> float:
        """Standard error of the value."""
        return standard_error(self.influence)

    def minus(self, other: "Estimate") -> tuple[float, float]:
        """The difference to `other`, whose image i started from the same noise, and its standard error."""
        return self.value - other.value, standard_error(self.influence - other.influence)


def standard_error(influence: np.ndarray) -> float:
    """Standard deviation over sqrt(N)."""
    return float(influence.std(ddof=1) / np.sqrt(len(influence)))


@dataclass(frozen=True)
class Reference:
    """Statistics of the real digits: mean (D,), covariance (D, D) and its square root, a sample (M, D) for KID."""

    mean: np.ndarray
    covariance: np.ndarray
    covariance_root: np.ndarray
    sample: np.ndarray
    kernel_mean: float  # over the pairs of different digits of `sample`


@dataclass(frozen=True)
class Scores:
    fid: Estimate
    kid: Estimate
    inception_score: Estimate


def frechet_distance(mean1, covariance1, mean2, covariance2) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6).

    The trace of (C1 C2)^(1/2) is that of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2), so eigenvalues do.
    """
    root = symmetric_root(covariance1)
    overlap = np.sqrt(np.linalg.eigvalsh(root @ covariance2 @ root).clip(0)).sum()
    shift = mean1 - mean2
    return float(shift @ shift + np.trace(covariance1) + np.trace(covariance2) - 2 * overlap)


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The positive semidefinite square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def fid(features: np.ndarray, reference: Reference) -> Estimate:
    """Frechet distance of features (N, D) to the reference, covariances with N - 1 as in pytorch-fid.

    Influence of image x: 2 (m - m_r).(x - m) + (x - m)'(1 - G)(x - m), less its mean, where 1 - G is the derivative in
    the covariance C: G = R M^(-1/2) R with R the root of the reference's covariance and M = R C R.
    """
    mean, covariance = moments(features)
    root = reference.covariance_root
    values, vectors = np.linalg.eigh(root @ covariance @ root)
    kept = values > values[-1] * 1e-12
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


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), with N - 1, of features (N, D), in float64."""
    mean, scatter = features.mean(0, dtype=np.float64), 0.0
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        scatter = scatter + centred.T @ centred
    return mean, scatter / (len(features) - 1)


def kid(features: np.ndarray, reference: Reference) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4), over all images at once."""
    within = _kernel_sums(features, features, pairs_of_itself=True) / (len(features) - 1)
    across = _kernel_sums(features, reference.sample) / len(reference.sample)
    value = within.mean() + reference.kernel_mean - 2 * across.mean()
    influence = 2 * (within - across)
    return Estimate(float(value), influence - influence.mean())


def inception_score(probabilities: np.ndarray) -> Estimate:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016) over all images, one split; probabilities (N, K)."""
    log_ratio = np.log(probabilities.clip(1e-300)) - np.log(probabilities.mean(0).clip(1e-300))
    divergence = (probabilities * log_ratio).sum(1)
    value = float(np.exp(divergence.mean()))
    return Estimate(value, value * (divergence - divergence.mean()))


def psnr(images: torch.Tensor, baseline: torch.Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB of uint8 (N, 32, 32) to images of the same noise, from their mean squared error
    over all pixels, and its standard error; infinite where they are equal."""
    squared = np.concatenate(
        [
            (a.double() - b.double()).square().flatten(1).mean(1)
            for a, b in zip(images.split(CHUNK), baseline.split(CHUNK), strict=True)
        ]
    )
    mean = squared.mean()
    if mean == 0:
        return float("inf"), 0.0
    return float(10 * np.log10(255**2 / mean)), float(10 / np.log(10) * standard_error(squared) / mean)


def _kernel_sums(a: np.ndarray, b: np.ndarray, pairs_of_itself: bool = False) -> np.ndarray:
    """(N,): for each row of a, the sum of the kernel with all rows of b, but with itself where b is a."""
    sums = np.zeros(len(a))
    for i in range(0, len(a), CHUNK):
        part = a[i : i + CHUNK].astype(np.float64)
        for j in range(0, len(b), CHUNK):
            kernel = (part @ b[j : j + CHUNK].T / a.shape[1] + 1) ** 3
            if pairs_of_itself and i == j:
                np.fill_diagonal(kernel, 0.0)
            sums[i : i + CHUNK] += kernel.sum(1)
    return sums


def extract(images: torch.Tensor, network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D), float32, and class probabilities (N, K) of uint8 images (N, 32, 32); several processes share
    the work."""
    chunk = CHUNK if network.name == "mnist" else 50
    parts, results = images.split(chunk), []
    with torch.inference_mode():
        mine = distributed.shard(parts)
        for part in tqdm(
            mine, desc="features", unit="batch", disable=len(images) < 20 * chunk or distributed.rank() > 0
        ):
            results.append(tuple(result.numpy() for result in network.extract(part)))
    features, probabilities = zip(*distributed.gather(results, len(parts)), strict=True)
    return np.concatenate(features), np.concatenate(probabilities)


def require_enough(images: int, network: nn.Module) -> None:
    """Raises UserError where the covariance of the features would be singular for want of images."""
    needed = network.dimensions + 1
    if images < needed:
        raise UserError(
            f"{images} images are too few for {network.dimensions} features ({network.name}): give at least {needed}, "
            "with --images where they are sampled"
        )


def load_reference(digits: torch.Tensor, network: nn.Module, cache: Path | None) -> Reference:
    """Statistics of uint8 digits (N, 32, 32), kept in the folder `cache` under everything that they depend on.

    A kept file that is damaged, or that does not hold what it should, is made anew, and a line on stderr says so.
    """
    if cache is None:
        return make_reference(extract(digits, network)[0])
    key = sealed.hash_tensors({"digits": digits})[:12] + "-" + network.sha256[:12]
    path = cache / f"{network.name}-{key}.safetensors"
    reference = distributed.on_first(lambda: _read_reference(path, network.dimensions, len(digits)))
    if reference is None:
        reference = make_reference(extract(digits, network)[0])
        if distributed.rank() == 0:
            arrays = {k: torch.from_numpy(v) for k, v in vars(reference).items() if isinstance(v, np.ndarray)}
            sealed.save(path, "reference", arrays, {"kernel_mean": reference.kernel_mean})
    return reference


def _read_reference(path: Path, dimensions: int, digits: int) -> Reference | None:
    """The reference that is kept, or None where none is, or none that can be used."""
    if not path.is_file():
        return None
    square = (torch.float64, (dimensions, dimensions))
    expected = {
        "mean": (torch.float64, (dimensions,)),
        "covariance": square,
        "covariance_root": square,
        "sample": (torch.float32, (min(digits, KID_REFERENCE), dimensions)),
    }
    with suppress(sealed.CheckpointError, OSError):
        stored = sealed.load(path, "reference")
        tensors, metadata = sealed.require(path, stored, expected, {"kernel_mean": float})
        if all(np.isfinite(numbers).all() for numbers in (*tensors.values(), metadata["kernel_mean"])):
            return Reference(**{name: tensor.numpy() for name, tensor in tensors.items()}, **metadata)
    print(f"{path} is damaged or holds something else; it is made anew", file=sys.stderr)
    return None


def make_reference(features: np.ndarray) -> Reference:
    """Statistics of the features (N, D) of real digits."""
    mean, covariance = moments(features)
    chosen = np.random.default_rng(0).permutation(len(features))[:KID_REFERENCE]
    sample = features[np.sort(chosen)]
    pairs = len(sample) * (len(sample) - 1)
    kernel_mean = float(_kernel_sums(sample, sample, pairs_of_itself=True).sum() / pairs)
    return Reference(mean, covariance, symmetric_root(covariance), sample, kernel_mean)


def score(images: torch.Tensor, network: nn.Module, reference: Reference) -> Scores:
    """FID, KID and score of uint8 images (N, 32, 32)."""
    require_enough(len(images), network)
    features, probabilities = extract(images, network)
    return Scores(fid(features, reference), kid(features, reference), inception_score(probabilities))


def describe(network: nn.Module) -> str:
    """The name of the features for a table's header."""
    return f"{network.name} features {network.sha256[:8]}"
