"""Training on top of rounding: codes move to where the network's outputs are again those of the FP32 network."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from common.ddpm.schedule import Schedule
from common.runtime import distributed, sealed
from common.runtime.device import autocast, derive_seed
from common.training.loop import SAVE_SECONDS, stratified

BATCH = 64
CPU = torch.device("cpu")
PEAK_RATE = 0.002  # of Adam, in steps of the weight's own lattice
WARMUP = 0.1  # of the updates: Adam's first ones are all of full length
INSIDE = 0.45  # of a step: how far from its code a latent weight starts at most; at half a step lies the next code


def finetune(
    network: nn.Module,
    weights: dict[str, torch.Tensor],
    steps: dict[str, float],
    draw: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    schedule: Schedule,
    updates: int,
    precision: str,
    state_path: Path,
) -> dict[str, torch.Tensor]:
    """Weights near `weights` {name: tensor} that, rounded to multiples of their `steps`, let `network` predict what it
    does with its own; not rounded.

    Each update takes draw(i), digits (N, 1, 32, 32), timesteps (N,) and noise, and moves the weights against the
    gradient of the squared difference of the two predictions, the rounding taken for the identity (straight-through
    estimator, Bengio et al. 2013). The weights start in the cells of their codes, on the side of the network's own: so
    few cross at a time, where from the centres those with like gradients all would at once.

    precision: "fp32" or "bf16", of the products. Continues from `state_path` where it exists, writes it about once a
    minute, and leaves the result there. Raises CheckpointError where it is damaged.
    """
    device = next(network.parameters()).device
    lattice = {name: torch.tensor(step, dtype=torch.float32, device=device) for name, step in steps.items()}
    latent = {}
    for name, own in network.named_parameters():
        codes = (weights[name].to(device) / lattice[name]).round()
        latent[name] = nn.Parameter((own.detach() / lattice[name]).clamp(codes - INSIDE, codes + INSIDE))
    optimizer = torch.optim.Adam(latent.values(), lr=PEAK_RATE, betas=(0.9, 0.999))
    done, saved_at = 0, time.monotonic()
    if distributed.broadcast(state_path.exists()):
        done = _load_state(state_path, latent, optimizer)
    for i in tqdm(range(done, updates), desc="finetuning", initial=done, total=updates, unit="step"):
        x0, t, noise = draw(i)
        x = schedule.add_noise(x0, t, noise).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            with torch.no_grad():
                target = network(x, t).float()
            rounded = {name: (u + (u.round() - u).detach()) * lattice[name] for name, u in latent.items()}
            loss = (functional_call(network, rounded, (x, t)).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate_factor(i, updates)
        optimizer.step()
        if distributed.rank() == 0 and (time.monotonic() - saved_at > SAVE_SECONDS or i + 1 == updates):
            _save_state(state_path, i + 1, latent, optimizer if i + 1 < updates else None)
            saved_at = time.monotonic()
    distributed.barrier()
    return {name: (u.detach() * lattice[name]).cpu() for name, u in latent.items()}


def rate_factor(update: int, updates: int) -> float:
    """Half a cosine down to zero, times a linear warm-up."""
    return min(1, (update + 1) / (WARMUP * updates)) * 0.5 * (1 + math.cos(math.pi * update / updates))


def _save_state(path: Path, done: int, latent: dict[str, nn.Parameter], optimizer: torch.optim.Adam | None) -> None:
    tensors = {f"latent/{name}": u for name, u in latent.items()}
    if optimizer is not None:
        for name, u in latent.items():
            tensors |= {f"{key}/{name}": value for key, value in optimizer.state[u].items()}
    sealed.save(path, "finetuning", tensors, {"updates": done})


def _load_state(path: Path, latent: dict[str, nn.Parameter], optimizer: torch.optim.Adam) -> int:
    """Copies a saved state into place and returns the number of updates done."""
    tensors, metadata = sealed.load(path, "finetuning")
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        u = latent[name]
        if kind == "latent":
            u.data.copy_(value)
        else:
            optimizer.state[u][kind] = torch.empty_like(u).copy_(value) if value.dim() else value
    return metadata["updates"]


def sampler_of_digits(digits: torch.Tensor, schedule: Schedule, seed: int) -> Callable[[int], tuple]:
    """draw(i) for `finetune`, from digits (M, 1, 32, 32): timesteps as dense as they weigh in the finished image."""

    def draw(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(seed, "finetune", i))
        chosen = torch.randint(len(digits), (BATCH,), generator=generator)
        t = schedule.timesteps_at(stratified(BATCH, CPU, generator))
        noise = torch.randn(BATCH, *digits.shape[1:], generator=generator)
        return digits[chosen], t.to(digits.device), noise.to(digits.device)

    return draw
