"""The part of a quantized network's error that is the same for all images, at each timestep, in few numbers.

Where there is much noise, more than half of the squared error is of this kind, and it moves all images alike, which FID
does not forgive. To take it off is what bias correction does for one layer (Nagel et al. 2019, "Data-free quantization
through weight equalization and bias correction"), at the output and at each timestep.
"""

import numpy as np

MAPS, COEFFICIENTS = "output_bias.maps", "output_bias.coefficients"  # tensors of the network
STEP = 1.0  # of the images, in standard errors of the mean error
COEFFICIENT_STEP = 1 / 64


def factor(mean: np.ndarray, error: np.ndarray, rank: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(codes, steps) of `MAPS` (rank, D) and `COEFFICIENTS` (T, rank) whose product is nearest to `mean` (T, D), an
    error of the network at each timestep and pixel, where row t counts by its standard `error` (T,).

    By the singular value decomposition (Eckart & Young 1936) of mean / error.
    """
    left, values, right = np.linalg.svd(mean / error[:, None], full_matrices=False)
    timesteps = len(mean)
    maps = values[:rank, None] * right[:rank] / np.sqrt(timesteps)
    typical = float(np.sqrt(np.square(error).mean()))
    coefficients = left[:, :rank] * np.sqrt(timesteps) * (error / typical)[:, None]
    steps = {MAPS: STEP * typical, COEFFICIENTS: COEFFICIENT_STEP}
    codes = {MAPS: np.rint(maps / STEP), COEFFICIENTS: np.rint(coefficients / COEFFICIENT_STEP)}
    return {name: of.astype(np.int64) for name, of in codes.items()}, steps
