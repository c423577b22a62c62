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
MATRIX_RATE = 0.01  # of Adam at the start, in steps of the weight's own lattice
VECTOR_RATE = 1e-3  # the same for biases and norms, in units of their values
IMAGE_SHARE = 0.75  # of the timesteps, as in training


def finetune(
    network: nn.Module,
    weights: dict[str, torch.Tensor],
    steps: dict[str, float],
    draw: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    schedule: Schedule,
    updates: int,
) -> dict[str, torch.Tensor]:
    """Multiples of `steps` near `weights`, themselves such multiples, with which `network` predicts what it does with
    its own.

    Each update takes draw(i), digits (N, 1, 32, 32), timesteps (N,) and noise, and moves the weights against the
    gradient of the squared difference of the two predictions, the rounding taken for the identity (straight-through
    estimator, Bengio et al. 2013). A weight begins at the place nearest to the network's own that rounds to its code:
    were all to begin at their codes, many would change them at the same update.
    """
    own = dict(network.named_parameters())
    lattice, latent, groups = {}, {}, []
    for name, weight in weights.items():
        unit = lattice[name] = torch.tensor(steps[name], dtype=torch.float32, device=own[name].device)
        codes = (weight.to(unit.device) / unit).round()
        latent[name] = nn.Parameter(codes + (own[name].detach() / unit - codes).clamp(-0.49, 0.49))
        peak = MATRIX_RATE if weight.dim() > 1 else VECTOR_RATE / steps[name]
        groups.append({"params": [latent[name]], "peak": peak})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    for i in tqdm(range(updates), desc="finetuning", unit="step"):
        x0, t, noise = draw(i)
        x = schedule.add_noise(x0, t, noise)
        with torch.no_grad():
            target = network(x, t)
        rounded = {name: (u + (u.round() - u).detach()) * lattice[name] for name, u in latent.items()}
        loss = (functional_call(network, rounded, (x, t)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * i / updates))
        optimizer.step()
    return {name: (u.detach().round() * lattice[name]).cpu() for name, u in latent.items()}


def sampler_of_digits(digits: torch.Tensor, schedule: Schedule, seed: int) -> Callable[[int], tuple]:
    """draw(i) for `finetune`, from digits (M, 1, 32, 32), with the timesteps of training."""

    def draw(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(seed, "finetune", i))
        chosen = torch.randint(len(digits), (BATCH,), generator=generator)
        t = schedule.timesteps_at(stratified(BATCH, CPU, generator), IMAGE_SHARE)
        noise = torch.randn(BATCH, *digits.shape[1:], generator=generator)
        return digits[chosen], t.to(digits.device), noise.to(digits.device)

    return draw
