"""What `common.training.finetune` learns from: noised digits, and states on the way from noise to an image.

Digits come with new noise each time, and states for a few updates alone: of 16,384 inputs that came ten times each, the
codes learned the inputs (docs/quick.md).

Where it samples, a quantized network meets states that its own baseline made. On these, at little noise, its error is
half as large again as on noised digits: so half of what it learns from are such states.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn

from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import sample
from common.ddpm.schedule import Schedule
from common.runtime.device import autocast, derive_seed
from common.training.loop import stratified

BATCH = 64
STATES = 32  # of a batch
SAMPLER, STEPS = "dpm++", 20  # by which the states are made
IMAGES = 32  # whose states are made at a time
CPU = torch.device("cpu")

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs (N, C, H, W), timesteps (N,), outputs (N, C, H, W)
Draw = Callable[[int], Batch]  # of update i


def noised_digits(
    network: nn.Module,
    digits: torch.Tensor,
    schedule: Schedule,
    count: int,
    seed: int,
    precision: str,
    variance: float = 1.0,
) -> Draw:
    """Draws of so many `digits` (M, C, H, W) in [-1, 1]: noised, timesteps as dense as they weigh in the finished
    image, where images have this `variance`."""

    def draw(i: int) -> Batch:
        generator = torch.Generator().manual_seed(derive_seed(seed, "finetune", i))
        chosen = torch.randint(len(digits), (count,), generator=generator)
        t = schedule.timesteps_at(stratified(count, CPU, generator), variance=variance).to(digits.device)
        noise = torch.randn(count, *digits.shape[1:], generator=generator).to(digits.device)
        x = schedule.add_noise(digits[chosen], t, noise)
        return x, t, predict(network, x, t, precision)

    return draw


def sampled_states(
    network: nn.Module,
    schedule: Schedule,
    shape: tuple[int, int, int],
    count: int,
    seed: int,
    precision: str,
    variance: float = 1.0,
) -> Draw:
    """Draws of so many states that `network` meets while it samples images of `shape`, at those of the sampler's
    timesteps that are nearest to timesteps drawn as for `noised_digits`."""
    steps = min(STEPS, schedule.timesteps)
    updates = max(1, IMAGES * steps // count)  # which draw from the same states: about as many as there are
    timesteps = torch.tensor(schedule.spaced_timesteps(steps))

    @lru_cache(maxsize=1)
    def met_in(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        return sample_states(network, schedule, shape, steps, turn, seed, precision)

    def draw(i: int) -> Batch:
        states, outputs = met_in(i // updates)
        generator = torch.Generator().manual_seed(derive_seed(seed, "state", i))
        wanted = schedule.timesteps_at(stratified(count, CPU, generator), variance=variance)
        at = (timesteps - wanted[:, None]).abs().argmin(1)
        image = torch.randint(IMAGES, (count,), generator=generator)
        return states[at, image], timesteps[at].to(states.device), outputs[at, image]

    return draw


def sample_states(
    network: nn.Module,
    schedule: Schedule,
    shape: tuple[int, int, int],
    steps: int,
    turn: int,
    seed: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states (steps, IMAGES, C, H, W) from which `network` predicts the noise while it samples in so many steps,
    others for each `turn`; and what it predicts, of the same shape."""
    noise = NoiseStreams(derive_seed(seed, "states"), range(turn * IMAGES, (turn + 1) * IMAGES), shape)
    met = []

    def recorded(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        met.append((x, predict(network, x, t, precision)))
        return met[-1][1]

    sample(recorded, schedule, noise, SAMPLER, steps, device=next(network.parameters()).device)
    states, outputs = zip(*met, strict=True)
    return torch.stack(states), torch.stack(outputs)


def joined(*draws: Draw) -> Draw:
    """Draws of all, one after the other."""
    return lambda i: tuple(torch.cat(parts) for parts in zip(*(draw(i) for draw in draws), strict=True))


@torch.no_grad()
def predict(network: nn.Module, x: torch.Tensor, t: torch.Tensor, precision: str) -> torch.Tensor:
    """The outputs, in FP32, of products in `precision`."""
    with autocast(x.device, precision):
        return network(x.contiguous(memory_format=torch.channels_last), t).float()
