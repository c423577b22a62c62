"""Training on top of rounding: codes move to where the network's outputs are again those of the FP32 network."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from common.device import derive_seed
from common.diffusion import Schedule
from common.training import stratified

BATCH = 64
CPU = torch.device("cpu")
PEAK_RATE = 0.01  # of Adam, in steps of the weight's own lattice


def finetune(
    network: nn.Module,
    weights: dict[str, torch.Tensor],
    steps: dict[str, float],
    draw: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    schedule: Schedule,
    updates: int,
) -> dict[str, torch.Tensor]:
    """Weights near `weights` that, rounded to multiples of their `steps`, let `network` predict what it does with its
    own; not rounded.

    Each update takes draw(i), digits (N, 1, 32, 32), timesteps (N,) and noise, and moves the weights against the
    gradient of the squared difference of the two predictions, the rounding taken for the identity (straight-through
    estimator, Bengio et al. 2013).
    """
    device = next(network.parameters()).device
    lattice = {name: torch.tensor(step, dtype=torch.float32, device=device) for name, step in steps.items()}
    latent = {name: nn.Parameter(w.to(device) / lattice[name]) for name, w in weights.items()}
    optimizer = torch.optim.Adam(latent.values(), lr=PEAK_RATE, betas=(0.9, 0.99))
    for i in tqdm(range(updates), desc="finetuning", unit="step"):
        x0, t, noise = draw(i)
        x = schedule.add_noise(x0, t, noise)
        with torch.no_grad():
            target = network(x, t)
        rounded = {name: (u + (u.round() - u).detach()) * lattice[name] for name, u in latent.items()}
        loss = (functional_call(network, rounded, (x, t)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = PEAK_RATE * 0.5 * (1 + math.cos(math.pi * i / updates))
        optimizer.step()
    return {name: (u.detach() * lattice[name]).cpu() for name, u in latent.items()}


def sampler_of_digits(digits: torch.Tensor, schedule: Schedule, seed: int) -> Callable[[int], tuple]:
    """draw(i) for `finetune`, from digits (M, 1, 32, 32): timesteps as dense as they weigh in the finished image."""

    def draw(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(seed, "finetune", i))
        chosen = torch.randint(len(digits), (BATCH,), generator=generator)
        t = schedule.timesteps_at(stratified(BATCH, CPU, generator))
        noise = torch.randn(BATCH, *digits.shape[1:], generator=generator)
        return digits[chosen], t.to(digits.device), noise.to(digits.device)

    return draw
