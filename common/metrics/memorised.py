"""Does a generator copy its training digits? Distances of images to the nearest of them.

A copy lies at distance 0. Distances of held-out digits show what is usual for digits that were never seen. That
generated digits lie nearer than held-out ones is no sign of copying by itself: images that are smoother, or nearer to
the middle of their class, than real digits lie nearer to every digit, seen or not. So the second question is whether
seen digits are nearer than unseen ones (Meehan et al. 2020, "A non-parametric test to detect data-copying in generative
models", by the nearest digit alone). Where they are, the generator has learned something of these digits that does not
hold for others; how near it comes to them, the distances say.
"""

import numpy as np
import torch
from scipy.stats.mstats import mjci

CHUNK = 500  # images and digits at once, so that memory does not grow with either


def nearest(
    images: torch.Tensor, digits: torch.Tensor, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) each: the Euclidean distance, over pixels of 0..1, of each of `images` (uint8, (N, 32, 32)) to the nearest
    of `digits` (uint8, (M, 32, 32)), and which that is. Copies are at exactly 0; the first of equal ones counts."""
    found = []
    for some in images.split(CHUNK):
        some = some.to(device).flatten(1).double()  # integers, so that sums and differences of products are exact
        least = torch.full((len(some),), torch.inf, dtype=torch.float64, device=device)
        which = torch.zeros(len(some), dtype=torch.long, device=device)
        for start in range(0, len(digits), CHUNK):
            others = digits[start : start + CHUNK].to(device).flatten(1).double()
            squares = some.square().sum(1)[:, None] + others.square().sum(1) - 2 * some @ others.T
            value, index = squares.min(1)
            nearer = value < least
            least, which = torch.where(nearer, value, least), torch.where(nearer, start + index, which)
        found.append((least.sqrt().cpu() / 255, which.cpu()))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances).numpy(), torch.cat(indices).numpy()


def median_and_error(values: np.ndarray) -> tuple[float, float]:
    """The median of (N,) and its standard error: that of the bootstrap with infinitely many draws, which has a closed
    form (Maritz & Jarrett 1978, "A note on estimating the variance of the sample median")."""
    return float(np.median(values)), float(mjci(values, [0.5])[0])


def excess_of_training(indices: np.ndarray, training: int, total: int) -> tuple[float, float]:
    """By how much the share of images whose nearest digit, `indices` (N,), is one of the first `training` of `total`
    exceeds training / total, what it is on average where the generator does not know one from another; and the standard
    error that it then has, over which digits are the training's.

    One digit may be the nearest of many images, so digits are counted and not images alone. Training and held-out
    digits are taken for random parts of one set; the parts of MNIST itself are of different writers.
    """
    share = training / total
    of_digit = np.bincount(indices, minlength=total)  # (M,), images that it is the nearest of
    excess = of_digit[:training].sum() / len(indices) - share
    # Of a random choice without replacement of which digits' counts are summed (Cochran 1977, eq. 2.8).
    variance = training * (1 - share) * of_digit.var(ddof=1)
    return float(excess), float(variance**0.5 / len(indices))
