"""What `common.training.finetune` shows to the network: noised digits, and states on the way from noise to an image.

Where it samples, a quantized network meets states that its own baseline made. On these, at little noise, its error is
half as large again as on noised digits: so half of what it learns from are such states.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import sample
from common.ddpm.schedule import Schedule
from common.runtime.device import autocast, derive_seed
from common.training.loop import stratified

BATCH = 64
CYCLE = 256  # updates after which the same inputs come again, so that the network's own outputs are known
STATES_SHARE = 0.5  # of a batch
SAMPLER, STEPS = "dpm++", 20  # by which the states are made
AT_ONCE = 64  # images
KEPT_BYTES = 2**28  # of states, at most
CPU = torch.device("cpu")

Draw = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def sampler_of_digits(digits: torch.Tensor, schedule: Schedule, seed: int, variance: float = 1.0) -> Draw:
    """draw(i) for `finetune`, from digits (M, ...) in [-1, 1]: noised, timesteps as dense as they weigh in the finished
    image, where images have this `variance`."""

    def draw(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(seed, "finetune", i))
        chosen = torch.randint(len(digits), (BATCH,), generator=generator)
        t = schedule.timesteps_at(stratified(BATCH, CPU, generator), variance=variance).to(digits.device)
        noise = torch.randn(BATCH, *digits.shape[1:], generator=generator).to(digits.device)
        return schedule.add_noise(digits[chosen], t, noise), t

    return draw


def sample_states(
    network: nn.Module, schedule: Schedule, shape: tuple[int, int, int], updates: int, seed: int, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (S,) and the states (S, N, C, H, W) at each from which `network` predicts the noise while it samples N
    images of `shape`: about as many states as so many updates use."""
    device, steps = next(network.parameters()).device, min(STEPS, schedule.timesteps)
    images = math.ceil(min(updates, CYCLE) * BATCH * STATES_SHARE / steps)
    images = max(1, min(images, KEPT_BYTES // (steps * math.prod(shape) * 4)))
    met = [[] for _ in range(steps)]
    with tqdm(total=math.ceil(images / AT_ONCE) * steps, desc="states", unit="step") as bar:
        for start in range(0, images, AT_ONCE):
            noise = NoiseStreams(derive_seed(seed, "states"), range(start, min(images, start + AT_ONCE)), shape)
            at_step = iter(met)

            def recorded(x: torch.Tensor, t: torch.Tensor, at_step=at_step) -> torch.Tensor:
                next(at_step).append(x)
                with autocast(device, precision):
                    return network(x, t)

            sample(recorded, schedule, noise, SAMPLER, steps, device=device, on_step=bar.update)
    timesteps = torch.tensor(schedule.spaced_timesteps(steps), device=device)
    return timesteps, torch.stack([torch.cat(parts) for parts in met])


def with_states(draw: Draw, timesteps: torch.Tensor, states: torch.Tensor, seed: int) -> Draw:
    """`draw`, but a share `STATES_SHARE` of its inputs are `states` (S, N, C, H, W) at those of `timesteps` (S,) that
    are nearest to the drawn ones."""
    count = round(STATES_SHARE * BATCH)

    def mixed(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, t = (of_all.clone() for of_all in draw(i))
        generator = torch.Generator().manual_seed(derive_seed(seed, "states", i))
        replaced = torch.randperm(len(x), generator=generator)[:count].to(x.device)
        image = torch.randint(states.shape[1], (count,), generator=generator).to(x.device)
        nearest = (timesteps - t[replaced, None]).abs().argmin(1)
        x[replaced], t[replaced] = states[nearest, image], timesteps[nearest]
        return x, t

    return mixed
