"""The training loop. All randomness of step k follows from (seed, k), so a resumed run repeats the rest bit for bit."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common.ddpm.architecture import Architecture, described, schedule_of
from common.ddpm.digits import to_model_range
from common.ddpm.schedule import denoising_loss
from common.errors import UserError
from common.presets import TrainingConfig
from common.runtime import distributed, sealed
from common.runtime.device import autocast, derive_seed
from common.runtime.replay import Replayed
from common.training.muon import Muon

SAVE_SECONDS = 60
BEGIN_ANEW = "delete it to begin anew"


class TrainingError(UserError):
    """Training that cannot go on."""


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Linear warm-up to 1, then half a cosine down to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(network: nn.Module, config: TrainingConfig, precision: str) -> list[torch.optim.Optimizer]:
    """Muon for the weights of hidden layers; Adam for the first and the last layer, biases and norms.

    Their rates are tensors on the network's device, and change in place.
    """
    ends = (getattr(network, name, None) for name in ("shallow_conv", "output_conv", "conv_in", "conv_out"))
    outer = {parameter for module in ends if module is not None for parameter in module.parameters()}
    hidden = [p for p in network.parameters() if p.dim() > 1 and p not in outer]
    others = [p for p in network.parameters() if p.dim() == 1 or p in outer]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    device = hidden[0].device
    muon_lr, lr = (torch.tensor(rate, device=device) for rate in (config.muon_lr, config.lr))
    recorded = device.type == "cuda"  # by `Replayed`
    return [Muon(hidden, muon_lr, dtype=dtype), torch.optim.Adam(others, lr, fused=True, capturable=recorded)]


def ema_decay(config: TrainingConfig, step: int) -> float:
    """Ramps up from 0.1, so that early averages hold no initial weights."""
    return min(config.ema, (1 + step) / (10 + step))


def stratified(n: int, device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """(n,) float64, a place in each n-th part of 0..1: uniform, with less variance than n independent draws."""
    return (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device, dtype=torch.float64)) / n


class EpochOrder:
    """Which digits step k sees: each epoch is a permutation drawn from (seed, epoch), and kept on `device`."""

    def __init__(self, digits: int, batch_size: int, seed: int, device: torch.device | str = "cpu"):
        self.digits, self.batch_size, self.seed, self.device = digits, batch_size, seed, device
        self._permutations: dict[int, torch.Tensor] = {}

    def indices(self, step: int) -> torch.Tensor:
        """(batch_size,) int64; a batch may end one epoch and begin the next."""
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        epochs = range(first // self.digits, (end - 1) // self.digits + 1)
        known = self._permutations
        self._permutations = {e: known[e] if e in known else self._permutation(e) for e in epochs}
        return torch.cat(
            [order[max(0, first - e * self.digits) : end - e * self.digits] for e, order in self._permutations.items()]
        )

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        return torch.randperm(self.digits, generator=generator).to(self.device)


def train(
    network: nn.Module,
    config: TrainingConfig,
    digits: torch.Tensor,
    state_path: Path,
    device: torch.device,
    precision: str,
    on_step: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, ema: None,
    architecture: Architecture | None = None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Trains `network` on `digits` (uint8, (N, 32, 32) or (N, C, H, W)); returns the EMA weights and the loss of each
    step. architecture: the network's; by default its `config`.

    Continues from `state_path` where it exists, and writes it about once a minute. Several processes share each batch.
    After each step `on_step(steps done, EMA weights)` is called. Raises TrainingError when a loss is not finite, the
    state belongs to another run or the batch cannot be shared; CheckpointError when the file of the state is damaged.
    """
    processes, rank = distributed.processes(), distributed.rank()
    if config.batch_size % processes:
        raise TrainingError(
            f"a batch of {config.batch_size} digits does not divide by {processes} processes: start as many as do"
        )
    mine = slice(rank * config.batch_size // processes, (rank + 1) * config.batch_size // processes)
    architecture = architecture or network.config
    schedule = schedule_of(architecture, device)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    network.to(device, memory_format=torch.channels_last).train()
    parameters = dict(network.named_parameters())
    optimizers = make_optimizers(network, config, precision)
    peaks = [float(optimizer.defaults["lr"]) for optimizer in optimizers]
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    losses = torch.zeros(config.steps, device=device)
    run = {
        "architecture": described(architecture),
        "training": asdict(config),
        "precision": precision,
        "digits": sealed.hash_tensors({"digits": digits}),
    }

    steps_done = 0
    if distributed.broadcast(state_path.exists()):
        steps_done = _load_state(state_path, run, parameters, ema, optimizers, losses)

    def update(x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The loss of this process's part of a batch; the weights make a step."""
        with autocast(device, precision):
            loss = denoising_loss(network, schedule, x0, t, noise).mean()
        network.zero_grad(set_to_none=True)
        loss.backward()
        distributed.average_gradients(parameters.values())
        nn.utils.clip_grad_norm_(parameters.values(), config.gradient_clip, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    if processes == 1:  # exchanges between processes are not recorded
        update = Replayed(update, device)
    images = digits.to(device)
    order = EpochOrder(len(digits), config.batch_size, config.seed, device)
    saved_at = time.monotonic()

    for step in tqdm(
        range(steps_done, config.steps), desc="training", initial=steps_done, total=config.steps, unit="step"
    ):
        torch.manual_seed(derive_seed(config.seed, "step", step))
        x0 = to_model_range(images[order.indices(step)]).contiguous(memory_format=torch.channels_last)
        t = schedule.timesteps_at(stratified(len(x0), device), config.image_share)
        noise = torch.randn_like(x0)
        if processes > 1:  # what was drawn until here is of the whole batch; dropout is each process's own
            torch.manual_seed(derive_seed(config.seed, "dropout", step, rank))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"].fill_(peak * learning_rate_factor(config, step))
        losses[step] = distributed.mean(update(x0[mine], t[mine], noise[mine]))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(parameters.values()), 1 - ema_decay(config, step))
        on_step(step + 1, ema)  # before the state is saved: what it keeps is complete whenever the process dies
        if rank == 0 and (time.monotonic() - saved_at > SAVE_SECONDS or step + 1 == config.steps):
            _require_finite(losses[: step + 1])
            _save_state(state_path, run, step + 1, parameters, ema, optimizers, losses)
            saved_at = time.monotonic()

    return {name: tensor.cpu().contiguous() for name, tensor in ema.items()}, losses.tolist()


def _require_finite(losses: torch.Tensor) -> None:
    finite = losses.isfinite()
    if not finite.all():
        raise TrainingError(
            f"the loss is not finite at step {int((~finite).nonzero()[0])}; the last good state is kept; "
            "to train with a lower learning rate, change it in common/presets.py, delete the state and use --retrain"
        )


def _save_state(path, run, step, parameters, ema, optimizers, losses) -> None:
    states = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    tensors = {"losses": losses}
    for name, parameter in parameters.items():
        tensors[f"weights/{name}"] = parameter
        tensors[f"ema/{name}"] = ema[name]
        for key, value in states[parameter].items():
            tensors[f"{key}/{name}"] = value
    sealed.save(path, "training", tensors, {**run, "step": step})


def _load_state(path, run, parameters, ema, optimizers, losses) -> int:
    """Copies a saved state into place and returns the number of steps done.

    Raises CheckpointError where it is damaged, TrainingError where it is not one of this run. Nothing is deleted: a
    state is hours of work.
    """
    tensors, metadata = sealed.load(path, "training")
    _require(path, sealed.require_metadata, metadata, {key: type(value) for key, value in run.items()} | {"step": int})
    step = metadata.pop("step")
    for key, value in run.items():
        if metadata[key] != _as_json(value):
            raise TrainingError(
                f"{path} is an unfinished run with another {key}: {metadata[key]} instead of {_as_json(value)}; "
                f"{BEGIN_ANEW}"
            )
    owner = {p: optimizer for optimizer in optimizers for p in optimizer.param_groups[0]["params"]}
    expected: dict[str, tuple] = {"losses": (torch.float32, losses.shape)}
    for name, parameter in parameters.items():
        kinds = ("momentum",) if isinstance(owner[parameter], Muon) else ("exp_avg", "exp_avg_sq")
        for kind in ("weights", "ema", *kinds):
            expected[f"{kind}/{name}"] = parameter.dtype, parameter.shape
        if "momentum" not in kinds:
            expected[f"step/{name}"] = torch.float32, ()
    _require(path, sealed.require_tensors, tensors, expected)
    if not 0 < step <= len(losses) or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise TrainingError(f"{path} is damaged: its numbers are not those of a training; {BEGIN_ANEW}")
    losses.copy_(tensors["losses"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weights/{name}"])
            ema[name].copy_(tensors[f"ema/{name}"])
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind in ("momentum", "exp_avg", "exp_avg_sq", "step"):
            parameter = parameters[name]
            value = torch.empty_like(parameter).copy_(value) if value.dim() else value.to(parameter.device)
            owner[parameter].state[parameter][kind] = value
    return step


def _require(path: Path, check: Callable, found: dict, expected: dict) -> None:
    try:
        check(found, expected)
    except ValueError as error:
        raise TrainingError(f"{path} is damaged or of another version ({error}); {BEGIN_ANEW}") from None


def _as_json(value):
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()} if isinstance(value, dict) else value
