"""Training on top of rounding: codes move to where the network's outputs are again those of the FP32 network."""

import hashlib
import json
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
from common.runtime.sealed import CheckpointError
from common.training.loop import SAVE_SECONDS, stratified

METHOD_VERSION = 1  # grows whenever `finetune` or `sampler_of_digits` comes to give other weights
BATCH = 64
CPU = torch.device("cpu")
PEAK_RATE = 0.002  # of Adam, in steps of the weight's own lattice
WARMUP = 0.1  # of the updates: Adam's first ones are all of full length
INSIDE = 0.45  # of a step: how far from its code a latent weight starts at most; at half a step lies the next code


def state_key(
    network: str, weights: str, steps: dict[str, float], data: str, seed: int, precision: str, updates: int
) -> str:
    """64 hexadecimal digits that differ wherever `finetune` would give other weights: a name for its state.

    network, weights: hashes of the network's own weights and of those it starts from; data, seed: of its digits.
    """
    method = [METHOD_VERSION, BATCH, PEAK_RATE, WARMUP, INSIDE, torch.__version__]
    of = [network, weights, sorted(steps.items()), data, seed, precision, updates, *method]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


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

    precision: "fp32" or "bf16", of the products. Continues from `state_path`, whose name should hold the `state_key`,
    where it exists, writes it about once a minute, and leaves the result there for the caller to remove. A state that
    is damaged or of another name is said in one line, and finetuning begins anew.
    """
    device = next(network.parameters()).device
    lattice = {name: torch.tensor(step, dtype=torch.float32, device=device) for name, step in steps.items()}
    latent = {}
    for name, own in network.named_parameters():
        codes = (weights[name].to(device) / lattice[name]).round()
        latent[name] = nn.Parameter((own.detach() / lattice[name]).clamp(codes - INSIDE, codes + INSIDE))
    optimizer = torch.optim.Adam(latent.values(), lr=PEAK_RATE, betas=(0.9, 0.999))
    done, saved_at = 0, time.monotonic()
    if (state := distributed.on_first(lambda: _read_state(state_path, latent, updates))) is not None:
        done = _load_state(*state, latent, optimizer)
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
    sealed.save(path, "finetuning", tensors, {"updates": done, "name": path.name})


def _read_state(path: Path, latent: dict[str, nn.Parameter], updates: int) -> tuple[dict, int] | None:
    """Tensors and number of updates done; None, said in one line, where the file is not this finetuning's."""
    if not path.exists():
        return None
    try:
        tensors, metadata = sealed.load(path, "finetuning")
        sealed.require_metadata(metadata, {"updates": int, "name": str})
        done = metadata["updates"]
        if metadata["name"] != path.name or not 0 < done <= updates:
            raise ValueError("it is of another finetuning")
        kinds = ("latent",) if done == updates else ("latent", "exp_avg", "exp_avg_sq")
        expected = {f"{kind}/{name}": (torch.float32, u.shape) for kind in kinds for name, u in latent.items()}
        if done < updates:
            expected |= {f"step/{name}": (torch.float32, ()) for name in latent}
        sealed.require_tensors(tensors, expected)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("its numbers are not finite")
    except CheckpointError as error:
        tqdm.write(f"{error}; finetuning begins anew")
        return None
    except ValueError as error:
        tqdm.write(f"{path} is damaged or of another version ({error}); finetuning begins anew")
        return None
    return tensors, done


def _load_state(
    tensors: dict[str, torch.Tensor], done: int, latent: dict[str, nn.Parameter], optimizer: torch.optim.Adam
) -> int:
    """Copies what `_read_state` gave into place and returns the number of updates done."""
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        u = latent[name]
        if kind == "latent":
            u.data.copy_(value)
        else:
            optimizer.state[u][kind] = value if kind == "step" else torch.empty_like(u).copy_(value)
    return done


def sampler_of_digits(digits: torch.Tensor, schedule: Schedule, seed: int) -> Callable[[int], tuple]:
    """draw(i) for `finetune`, from digits (M, 1, 32, 32): timesteps as dense as they weigh in the finished image."""

    def draw(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(seed, "finetune", i))
        chosen = torch.randint(len(digits), (BATCH,), generator=generator)
        t = schedule.timesteps_at(stratified(BATCH, CPU, generator))
        noise = torch.randn(BATCH, *digits.shape[1:], generator=generator)
        return digits[chosen], t.to(digits.device), noise.to(digits.device)

    return draw
