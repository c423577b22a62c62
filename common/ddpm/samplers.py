"""The samplers: from noise to images."""

from collections.abc import Callable

import torch

from common.ddpm.noise import NoiseStreams
from common.ddpm.schedule import Schedule

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.inference_mode()
def sample(
    network: Denoiser,
    schedule: Schedule,
    noise: NoiseStreams,
    sampler: str,
    steps: int,
    eta: float = 0.0,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Images, float (N, C, H, W), one for each stream of `noise`.

    sampler: "ddpm" (all T steps; `steps` must equal T), "ddim" (`steps` of 1..T, `eta` of 0..1) or "dpm++" (`steps` of
    1..T). Each step ends in `on_step()`.
    """
    stochastic, before = sampler != "ddim" or eta > 0, None
    timesteps = schedule.spaced_timesteps(steps)
    x = noise.draw(device).to(memory_format=torch.channels_last)
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        output = network(x, torch.full((len(x),), t, device=x.device)).float()
        fresh = noise.draw(device) if stochastic and t_next >= 0 else torch.zeros_like(x)
        if sampler == "ddim":
            x = schedule.ddim_step(x, output, t, t_next, eta, fresh)
        elif sampler == "dpm++":
            x0 = schedule.predict_x0(x, output, t)
            x, before = schedule.dpm_step(x, x0, before, t, t_next, fresh), (t, x0)
        else:
            x = schedule.ddpm_step(x, output, t, fresh)
        on_step()
    return x
