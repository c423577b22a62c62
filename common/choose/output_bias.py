"""What is the same for all images in a quantized network's error, at each timestep, in few numbers.

Where there is much noise, more than half of the squared error is of this kind, and it moves all images alike, which FID
does not forgive. To take it off is what bias correction does for one layer (Nagel et al. 2019, "Data-free quantization
through weight equalization and bias correction"), at the output and at each timestep.

Besides, the digits that the output implies lie too near to their mean: rounded weights make of different inputs what
differs less. PTQD (He et al. 2023, arXiv:2305.10657) corrects such a slope of the predicted noise.
"""

import numpy as np

MAPS, MIXTURE, CONTRAST = "output_bias.maps", "output_bias.mixture", "output_bias.contrast"  # tensors of the network
STEP = 1.0  # of the maps, in standard errors of the mean error
MIXTURE_STEP, CONTRAST_STEP = 1 / 64, 1 / 1024
MOST_CONTRAST = 1.0


def factor(mean: np.ndarray, error: np.ndarray, rank: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(codes, steps) of `MAPS` (rank, D) and `MIXTURE` (T, rank) whose product is nearest to `mean` (T, D), an error of
    the network at each timestep and pixel.

    By the singular value decomposition (Eckart & Young 1936) of mean / sqrt(error), with the standard `error` (T,) of
    each row: between errors that count alike and errors that count by how well they are known. Both alone leave more of
    the error, the one where there is much noise, the other where there is little.
    """
    typical = float(np.sqrt(np.square(error).mean()))
    spread = np.sqrt(error * typical)
    left, values, right = np.linalg.svd(mean / spread[:, None], full_matrices=False)
    timesteps = len(mean)
    maps = values[:rank, None] * right[:rank] / np.sqrt(timesteps)
    mixture = left[:, :rank] * np.sqrt(timesteps) * (spread / typical)[:, None]
    steps = {MAPS: STEP * typical, MIXTURE: MIXTURE_STEP}
    codes = {MAPS: np.rint(maps / STEP), MIXTURE: np.rint(mixture / MIXTURE_STEP)}
    return {name: of.astype(np.int64) for name, of in codes.items()}, steps


def lacking_contrast(wanted: np.ndarray, found: np.ndarray) -> float:
    """c, a multiple of `CONTRAST_STEP` of at most `MOST_CONTRAST`, by which the images `found` (N, D) have to be moved
    away from their mean, (1 + c) (found - mean), so that the least-squares slope of these deviations against those of
    the images `wanted` (N, D) is one."""
    wanted, found = wanted - wanted.mean(0), found - found.mean(0)
    there, common = np.square(wanted).sum(), (wanted * found).sum()
    contrast = there / max(common, there / (1 + MOST_CONTRAST)) - 1 if there > 0 else 0.0
    return CONTRAST_STEP * round(contrast / CONTRAST_STEP)
