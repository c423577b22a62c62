"""Fisher information, and what rounding by feedback needs, of the diffusion loss on real digits."""

from pathlib import Path

import torch

from common.choose.feedback import Feedback, measure_feedback
from common.ddpm.digits import load_digits, to_model_range
from common.ddpm.noise import NoiseStreams
from common.ddpm.schedule import Schedule, denoising_loss
from common.fisher import information
from common.fisher.gradients import SampleLoss
from common.formats.packed import Model
from common.runtime import distributed
from common.runtime.device import derive_seed
from common.runtime.sealed import CheckpointError
from common.study.run import Run

FISHER_GRID = 20  # timesteps, at the centres of equal parts of 0..T-1
FISHER_SEED = 0


def fisher_table(run: Run, model: Model) -> information.FisherTable:
    """Fisher values of the baseline at timestep 1 and on a grid; measured where no file fits the weights.

    Raises UserError where the file belongs to other weights, or the values are not finite or all zero.
    """
    schedule, preset = Schedule(model.config.timesteps, run.device), run.preset
    grid = [int((i + 0.5) * schedule.timesteps / FISHER_GRID) for i in range(FISHER_GRID)]
    settings = {
        "data": run.data,
        "digits": preset.fisher_digits,
        "grid_digits": preset.fisher_grid_digits,
        "grid": grid,
    }
    weights = model.sha256
    path = run.out / f"fisher-{weights[:12]}.safetensors"
    kept = distributed.on_first(lambda: _kept_table(path, model, settings))
    if kept is not None:
        return kept
    digits = load_digits(run.data, "train", run.data_dir)
    batches = {1: noised(run, digits, [1] * preset.fisher_digits)} | {
        t: noised(run, digits, [t] * preset.fisher_grid_digits) for t in grid
    }
    network = model.network().to(run.device)
    table = information.measure(
        network, diffusion_loss(schedule), batches, weights, settings, schedule.image_weights(grid)
    )
    if distributed.rank() == 0:
        information.save(path, table)
    return table


def _kept_table(path: Path, model: Model, settings: dict) -> information.FisherTable | None:
    """What the file holds; None, said in one line, where it has to be made anew."""
    if not path.exists():
        return None
    try:
        table = information.load(path, model.sha256)
    except CheckpointError as error:
        print(f"{error}; Fisher values are measured anew")
        return None
    if (table.settings, table.timesteps, table.names) == (settings, [1, *settings["grid"]], list(model.state)):
        return table
    print(f"{path} holds Fisher values of other settings; they are measured anew")
    return None


def rounding_feedback(run: Run, model: Model) -> dict[str, Feedback]:
    """What rounding by feedback needs to know of the baseline's weights, from real digits.

    Timesteps lie as densely as they weigh in the finished image.
    """
    schedule, n = Schedule(model.config.timesteps, run.device), run.preset.fisher_digits
    timesteps = schedule.timesteps_at((torch.arange(n) + 0.5) / n)
    network = model.network().to(run.device)
    samples = noised(run, load_digits(run.data, "train", run.data_dir), timesteps.tolist())
    return measure_feedback(network, diffusion_loss(schedule), samples)


def training_digits(run: Run) -> torch.Tensor:
    """The digits that --data trains on, (N, 1, 32, 32) in [-1, 1], on the device."""
    return to_model_range(load_digits(run.data, "train", run.data_dir)).to(run.device)


def noised(run: Run, digits: torch.Tensor, timesteps: list[int]) -> tuple[torch.Tensor, ...]:
    """What `diffusion_loss` takes: some of `digits` (uint8), always the same, timesteps (N,), and noise."""
    generator = torch.Generator().manual_seed(derive_seed(FISHER_SEED, "fisher"))
    chosen, n = torch.randperm(len(digits), generator=generator), len(timesteps)
    noise = NoiseStreams(derive_seed(FISHER_SEED, "fisher", timesteps[0]), range(n)).draw(run.device)
    return to_model_range(digits[chosen[:n]]).to(run.device), torch.tensor(timesteps, device=run.device), noise


def diffusion_loss(schedule: Schedule) -> SampleLoss:
    def loss(call, x0, t, noise):
        return denoising_loss(call, schedule, x0, t, noise)

    return loss
