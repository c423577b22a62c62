"""The published way, re-created from its description: FP32, contiguous memory, one image at a time, dropout in
attention always on, one backward pass for each Fisher sample, batches of 64 in training.

Each function returns seconds for one unit of work. `benchmarks.speed` calls them in a process that sets up nothing, as
the published code does not.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import torch
import torch.nn.functional as F

from common.ddpm.schedule import Schedule, denoising_loss
from common.ddpm.unet import UNet
from common.presets import UNetConfig

BATCH = 64  # of training
SAMPLING_STEPS = 2
FISHER_DIGITS = 2


@cache
def network_of(config: UNetConfig, device: torch.device) -> UNet:
    torch.manual_seed(0)
    return UNet(replace(config, dropout=0.1)).to(device).eval()


def with_dropout():
    """Context: attention as published, with dropout on its weights at all times."""
    attention = partial(F.scaled_dot_product_attention, dropout_p=0.1)
    return mock.patch.object(F, "scaled_dot_product_attention", attention)


def now(device: torch.device) -> float:
    """The time, in seconds, when the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = now(device)
    work()
    return now(device) - start


@torch.no_grad()
def sampling(config: UNetConfig, device: torch.device) -> float:
    """One image and step."""
    network, schedule = network_of(config, device), Schedule(config.timesteps)
    x = torch.randn(1, 1, 32, 32, device=device)

    def steps():
        for t in range(SAMPLING_STEPS, 0, -1):
            eps = network(x, torch.full((1,), t, device=device))
            schedule.ddpm_step(x, eps, t, torch.randn_like(x))

    with with_dropout():
        return timed(device, steps) / SAMPLING_STEPS


def training(config: UNetConfig, device: torch.device) -> float:
    """One digit of a step of plain Adam, and of an average that goes from tensor to tensor."""
    network, schedule = UNet(replace(config, dropout=0.1)).to(device).train(), Schedule(config.timesteps)
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=2e-5, foreach=False)
    averages = [p.detach().clone() for p in parameters]
    x0 = torch.rand(BATCH, 1, 32, 32, device=device)
    t = torch.randint(0, schedule.timesteps, (BATCH,), device=device)

    def step():
        loss = denoising_loss(network, schedule, x0, t, torch.randn_like(x0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(averages, parameters, strict=True):
                average.mul_(0.9999).add_(0.0001 * parameter)

    with with_dropout():
        step()
        return timed(device, step) / BATCH


def fisher(config: UNetConfig, device: torch.device) -> float:
    """One digit."""
    network, schedule = network_of(config, device), Schedule(config.timesteps)

    def each():
        for x0, t, noise in zip(*(s.split(1) for s in fisher_samples(device, FISHER_DIGITS)), strict=True):
            network.zero_grad()
            denoising_loss(network, schedule, x0, t, noise).sum().backward()
            [p.grad.square().mean() for p in network.parameters()]

    with with_dropout():
        return timed(device, each) / FISHER_DIGITS


def fisher_samples(device: torch.device, digits: int) -> tuple[torch.Tensor, ...]:
    """Digits, timestep 1 and noise."""
    x0, noise = torch.randn(2, digits, 1, 32, 32, device=device)
    return x0, torch.full((digits,), 1, device=device), noise
