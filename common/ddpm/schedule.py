"""The DDPM: noise schedule, the steps back along it, and the training loss."""

import numpy as np
import torch
from torch import nn


class Schedule:
    """Timesteps are 0..T-1; 0 holds the least noise. By default linear beta from 1e-4 to 0.02 (Ho et al. 2020, section
    4), and the network predicts the noise.

    device: where `add_noise` and `timesteps_at` are mostly called; elsewhere each call copies a table there.
    betas: (T,) float64. prediction: what the network's output is, "epsilon" (the noise), "v_prediction" (Salimans and
    Ho 2022, appendix D) or "sample" (x_0). clip: the largest magnitude of a predicted x_0; None: any.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        device: torch.device | str = "cpu",
        betas: np.ndarray | None = None,
        prediction: str = "epsilon",
        clip: float | None = 1.0,
    ):
        self.timesteps, self.prediction, self.clip = timesteps, prediction, clip
        # float64; the products below lose digits in float32
        self.betas = np.linspace(1e-4, 0.02, timesteps) if betas is None else betas
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self._abar = torch.from_numpy(self.alphas_cumprod).to(device)
        self._quantiles: dict[tuple[float, float], torch.Tensor] = {}

    def add_noise(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4); x0, noise (N, ...), t (N,)."""
        abar = self._abar.to(x0.device)[t].view(-1, *[1] * (x0.dim() - 1))
        return abar.sqrt().to(x0.dtype) * x0 + (1 - abar).sqrt().to(x0.dtype) * noise

    def target(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network should predict of x_t = add_noise(x0, t, noise)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        abar = self._abar.to(x0.device)[t].view(-1, *[1] * (x0.dim() - 1))
        return abar.sqrt().to(x0.dtype) * noise - (1 - abar).sqrt().to(x0.dtype) * x0

    def predict_x0(self, x: torch.Tensor, output: torch.Tensor, t: int) -> torch.Tensor:
        """x_0 that x_t and the network's output imply, clipped to the range of the data."""
        abar = self.alphas_cumprod[t]
        if self.prediction == "epsilon":
            x0 = (x - float(np.sqrt(1 - abar)) * output) / float(np.sqrt(abar))
        elif self.prediction == "v_prediction":
            x0 = float(np.sqrt(abar)) * x - float(np.sqrt(1 - abar)) * output
        else:
            x0 = output.clone()
        return x0 if self.clip is None else x0.clamp_(-self.clip, self.clip)

    def noise_level(self, t: int) -> float:
        """Standard deviation of the noise in x_t."""
        return float(np.sqrt(1 - self.alphas_cumprod[t]))

    def noise_ratio(self, t: int) -> float:
        """Standard deviation of the noise in x_t over the share of x_0: how far an error of the predicted noise moves
        the predicted x_0."""
        abar = self.alphas_cumprod[t]
        return float(np.sqrt((1 - abar) / abar))

    def ddpm_step(self, x: torch.Tensor, output: torch.Tensor, t: int, noise: torch.Tensor) -> torch.Tensor:
        """x_{t-1} of the ancestral sampler with the posterior variance (Ho et al. 2020, eq. 7); no noise at t = 0."""
        abar, beta = self.alphas_cumprod[t], self.betas[t]
        abar_prev = self.alphas_cumprod[t - 1] if t > 0 else 1.0
        x0_weight = np.sqrt(abar_prev) * beta / (1 - abar)
        x_weight = np.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar)
        sigma = np.sqrt(beta * (1 - abar_prev) / (1 - abar))
        return float(x0_weight) * self.predict_x0(x, output, t) + float(x_weight) * x + float(sigma) * noise

    def ddim_step(
        self, x: torch.Tensor, output: torch.Tensor, t: int, t_next: int, eta: float, noise: torch.Tensor
    ) -> torch.Tensor:
        """x at the earlier timestep `t_next` (-1: the finished image; Song et al. 2021, eq. 12 and 16).

        eta: 0 is deterministic, 1 adds as much fresh `noise` as the ancestral sampler would. The noise already in x is
        taken anew from the clipped x_0: with the predicted one some images drift to white.
        """
        abar, abar_next = self.alphas_cumprod[t], self.alphas_cumprod[t_next] if t_next >= 0 else 1.0
        x0 = self.predict_x0(x, output, t)
        own_noise = (x - float(np.sqrt(abar)) * x0) / float(np.sqrt(1 - abar))
        variance = eta**2 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
        x_next = float(np.sqrt(abar_next)) * x0 + float(np.sqrt(1 - abar_next - variance)) * own_noise
        return x_next + float(np.sqrt(variance)) * noise

    def dpm_step(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        before: tuple[int, torch.Tensor] | None,
        t: int,
        t_next: int,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """x at `t_next` (-1: the finished image) by the stochastic second-order multistep DPM-Solver++ (Lu et al. 2022,
        arXiv:2211.01095, appendix A, "SDE-DPM-Solver++(2M)").

        x0: the digit predicted at t; before: timestep and prediction of the step before, from which x0 is
        extrapolated; the first step has none and is DDIM's with eta 1, as is the last.
        """
        if t_next < 0:
            return x0
        abar, abar_next = self.alphas_cumprod[t], self.alphas_cumprod[t_next]
        h = self._half_log_snr(t_next) - self._half_log_snr(t)
        if before is not None:
            t_before, x0_before = before
            ratio = h / (self._half_log_snr(t) - self._half_log_snr(t_before))
            x0 = x0 + (x0 - x0_before) * float(ratio / 2)
        x_weight = np.sqrt((1 - abar_next) / (1 - abar)) * np.exp(-h)
        new = -np.expm1(-2 * h)  # share of the variance that is drawn anew
        return (
            float(x_weight) * x + float(np.sqrt(abar_next) * new) * x0 + float(np.sqrt((1 - abar_next) * new)) * noise
        )

    def _half_log_snr(self, t: int) -> float:
        with np.errstate(divide="ignore"):  # minus infinity where a timestep holds noise alone, as it should be
            return 0.5 * np.log(self.alphas_cumprod[t] / (1 - self.alphas_cumprod[t]))

    def image_weights(self, timesteps: list[int], variance: float = 1.0) -> list[float]:
        """How much a squared error of the network's output at each timestep weighs in the finished image.

        With s^2 = (1 - abar) / abar, an error e of predicted noise moves the predicted x_0 by s e. Of that the later
        steps keep the share v / (v + s^2), where images have the `variance` v in its direction: the less, the more
        noise hides it (Wiener's filter). The weight is the square of both; abar (1 - abar) for the variance 1. An
        error of a predicted v moves x_0 by (1 - abar)^(1/2) e, and one of a predicted x_0 by e.
        """
        abar = self.alphas_cumprod[timesteps]
        moved = {"epsilon": 1 - abar, "v_prediction": abar * (1 - abar), "sample": abar}[self.prediction]  # abar s^2 ..
        kept = variance / (variance * abar + 1 - abar)  # .. and the share by abar, since abar may be zero
        return (abar * moved * kept**2).tolist()

    def timesteps_at(self, places: torch.Tensor, image_share: float = 1.0, variance: float = 1.0) -> torch.Tensor:
        """Quantiles of the timesteps, (N,) int64, at `places` (N,) of 0..1.

        A share `image_share` of the timesteps lies as densely as `image_weights` of the `variance`, the rest evenly
        over 0..T-1.
        """
        key = image_share, variance
        if key not in self._quantiles:
            weights = np.array(self.image_weights(list(range(self.timesteps)), variance))
            density = image_share * weights / weights.sum() + (1 - image_share) / self.timesteps
            self._quantiles[key] = torch.from_numpy(np.cumsum(density)).to(self._abar.device)
        return torch.searchsorted(self._quantiles[key].to(places.device), places.double()).clamp_(
            max=self.timesteps - 1
        )

    def spaced_timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps from T-1 down, evenly spaced ("trailing", Lin et al. 2024, table 2)."""
        return [round(self.timesteps - i * self.timesteps / steps) - 1 for i in range(steps)]


def denoising_loss(network: nn.Module, schedule: Schedule, x0, t, noise) -> torch.Tensor:
    """(N,): mean squared error between what should be and what is predicted of each image; of a network that predicts
    the noise eq. 14 of Ho et al. 2020."""
    output = network(schedule.add_noise(x0, t, noise), t)
    return (output - schedule.target(x0, t, noise)).float().square().flatten(1).mean(1)
