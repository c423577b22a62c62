"""The noise schedules that a scheduler's config of diffusers names."""

import math

import numpy as np

LARGEST_BETA = 0.999  # of the schedules that are given as a product (Nichol and Dhariwal 2021, section 3.2)


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))


_PRODUCTS = {"squaredcos_cap_v2": _cosine, "laplace": _laplace}
BETA_SCHEDULES = ("linear", "scaled_linear", "sigmoid", *_PRODUCTS)


def betas_of(scheduler: dict) -> np.ndarray:
    """(T,) float64: the variances of the noise that each timestep adds, of a checked config (`pipelines.checked`)."""
    timesteps, name = scheduler["num_train_timesteps"], scheduler["beta_schedule"]
    first, last = scheduler["beta_start"], scheduler["beta_end"]
    if scheduler["trained_betas"] is not None:
        betas = np.array(scheduler["trained_betas"], dtype=np.float64)
    elif name == "linear":
        betas = np.linspace(first, last, timesteps)
    elif name == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, timesteps) ** 2
    elif name == "sigmoid":
        betas = first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, timesteps)))
    else:
        of = _PRODUCTS[name]
        ratios = (of((i + 1) / timesteps) / of(i / timesteps) for i in range(timesteps))
        betas = np.array([min(1 - ratio, LARGEST_BETA) for ratio in ratios])
    return to_zero_snr(betas) if scheduler["rescale_betas_zero_snr"] else betas


def to_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last timestep holds noise alone (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    product = root**2
    return 1 - product / np.concatenate([[1.0], product[:-1]])
