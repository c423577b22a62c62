"""FID, KID and Inception-style score of images, and PSNR between two models', each with its standard error.

Errors are those of drawing other generated images from the same model (`common.metrics.estimate`); the reference digits
are held fixed.
"""

import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.errors import UserError
from common.metrics.estimate import Estimate, pool, standard_error
from common.metrics.frechet import CHUNK, Reference, fid, fid_unbiased, moments, symmetric_root
from common.runtime import distributed, sealed

KID_REFERENCE = 5_000  # digits at most; the kernel's cost grows with the square


@dataclass(frozen=True)
class Scores:
    """Of images of one draw, or of several together. fid: of as many images as a draw has; fid_unbiased: as of
    infinitely many; inception_score: of features that know classes alone."""

    fid: Estimate
    fid_unbiased: Estimate
    kid: Estimate
    inception_score: Estimate | None


def kid(features: np.ndarray, reference: Reference) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4), over all images at once.

    Where the distance is near zero its error is somewhat too large, at most by the square root of two.
    """
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


def squared_errors(images: torch.Tensor, baseline: torch.Tensor) -> np.ndarray:
    """(N,): the mean squared error over the pixels of each of uint8 (N, ...) to the image of the same noise."""
    return np.concatenate(
        [
            (a.double() - b.double()).square().flatten(1).mean(1)
            for a, b in zip(images.split(CHUNK), baseline.split(CHUNK), strict=True)
        ]
    )


def psnr(squared: np.ndarray) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB of images with these `squared_errors` (N,), from their mean, and its standard
    error; infinite where all are zero."""
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


def extract(images: torch.Tensor, network: nn.Module) -> tuple[np.ndarray, np.ndarray | None]:
    """Features (N, D), float32, and class probabilities (N, K), where the features know any, of uint8 images (N, H, W)
    or (N, C, H, W); several processes share the work."""
    chunk = 50 if network.name == "inception" else max(1, CHUNK * 32 * 32 // images[0].numel())
    parts, results = images.split(chunk), []
    with torch.inference_mode():
        mine = distributed.shard(parts)
        for part in tqdm(
            mine, desc="features", unit="batch", disable=len(images) < 20 * chunk or distributed.rank() > 0
        ):
            results.append(tuple(None if result is None else result.numpy() for result in network.extract(part)))
    features, probabilities = zip(*distributed.gather(results, len(parts)), strict=True)
    return np.concatenate(features), None if probabilities[0] is None else np.concatenate(probabilities)


def require_enough(images: int, network: nn.Module) -> None:
    """Raises UserError where the covariance of the features would be singular for want of images."""
    needed = network.dimensions + 1
    if images < needed:
        raise UserError(
            f"{images} images are too few for {network.dimensions} features ({network.name}): give at least {needed}, "
            "with --images where they are sampled"
        )


def load_reference(digits: torch.Tensor, network: nn.Module, cache: Path | None, device: str = "cpu") -> Reference:
    """Statistics of uint8 digits (N, H, W) or (N, C, H, W), kept in the folder `cache` under everything that they
    depend on, the name of the `device` too: another rounds otherwise.

    A kept file that is damaged, or that does not hold what it should, is made anew, and a line on stderr says so.
    """
    if cache is None:
        return make_reference(extract(digits, network)[0])
    made_by = hashlib.sha256(f"{network.sha256} {device} {torch.__version__}".encode()).hexdigest()
    key = sealed.hash_tensors({"digits": digits})[:12] + "-" + made_by[:12]
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
    with suppress(sealed.CheckpointError, OSError, OverflowError):  # the last of a whole number that no float holds
        stored = sealed.load(path, "reference")
        tensors, metadata = sealed.require(path, stored, expected, {"kernel_mean": float})
        if all(np.isfinite(numbers).all() for numbers in (*tensors.values(), float(metadata["kernel_mean"]))):
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
    """FID, KID and score of uint8 images (N, H, W) or (N, C, H, W)."""
    require_enough(len(images), network)
    features, probabilities = extract(images, network)
    return Scores(
        fid(features, reference),
        fid_unbiased(features, reference),
        kid(features, reference),
        None if probabilities is None else inception_score(probabilities),
    )


def pool_scores(draws: Sequence[Scores]) -> Scores:
    """The mean over draws of equally many images."""
    known = [field.name for field in fields(Scores) if getattr(draws[0], field.name) is not None]
    pooled = {name: pool([getattr(draw, name) for draw in draws]) for name in known}
    return Scores(**(dict.fromkeys(field.name for field in fields(Scores)) | pooled))


def describe(network: nn.Module) -> str:
    """The name of the features for a table's header."""
    return f"{network.name} features {network.sha256[:8]}"
