"""Fisher and Gauss-Newton values, and what rounding by feedback needs, of the diffusion loss on real digits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from common.choose.asymmetric import exact_inputs
from common.choose.feedback import Feedback, measure_feedback
from common.ddpm.architecture import schedule_of
from common.ddpm.digits import to_model_range
from common.ddpm.noise import NoiseStreams
from common.ddpm.schedule import Schedule, denoising_loss
from common.fisher import information
from common.fisher.gauss_newton import random_signs, signed_sum
from common.fisher.gradients import SampleLoss
from common.formats.packed import Model
from common.runtime import distributed
from common.runtime.device import derive_seed
from common.runtime.sealed import CheckpointError
from common.study.run import Run

FISHER_GRID = 20  # timesteps, at the centres of equal parts of 0..T-1
FISHER_SEED = 0
INPUT_BYTES = 2**30


def curvature_table(run: Run, model: Model) -> information.FisherTable:
    """The values that decide: those that --curvature names."""
    return gauss_newton_table(run, model) if run.curvature == "gauss-newton" else fisher_table(run, model)


def curvature_metadata(run: Run) -> dict[str, str]:
    """--curvature, where it is not the default: files and rows of Fisher values do not name it."""
    return {} if run.curvature == "fisher" else {"curvature": run.curvature}


def values_note(run: Run, note: str) -> str:
    """What a label says of the values that decide: `note`, which speaks of Fisher values or is empty, or the same of
    Gauss-Newton values."""
    return note if run.curvature == "fisher" else (note or "Fisher").replace("Fisher", "Gauss-Newton")


def fisher_table(run: Run, model: Model) -> information.FisherTable:
    """Fisher values of the baseline at timestep 1 and on a grid; measured where no file fits the weights.

    Raises UserError where the file belongs to other weights, or the values are not finite or all zero.
    """
    return _table(run, model, "fisher", diffusion_loss, lambda samples, timestep: samples)


def gauss_newton_table(run: Run, model: Model) -> information.FisherTable:
    """Gauss-Newton values of the baseline at the same timesteps and digits, in a file of their own.

    A value times the sum of the squared errors of a tensor's entries is the predicted increase of the loss of
    `denoising_loss`, the mean squared error over the pixels, at that timestep. Raises UserError as `fisher_table` does.
    """

    def with_signs(samples: tuple[torch.Tensor, ...], timestep: int) -> tuple[torch.Tensor, ...]:
        noise = samples[-1]
        return *samples, random_signs(noise.shape, derive_seed(FISHER_SEED, "signs", timestep)).to(noise.device)

    return _table(run, model, "gauss-newton", _signed_noise, with_signs)


def _signed_noise(schedule: Schedule) -> SampleLoss:
    return signed_sum(lambda call, x0, t, noise: call(schedule.add_noise(x0, t, noise), t))


def _table(
    run: Run,
    model: Model,
    kind: str,
    loss: Callable[[Schedule], SampleLoss],
    prepare: Callable[[tuple[torch.Tensor, ...], int], tuple[torch.Tensor, ...]],
) -> information.FisherTable:
    """prepare(samples, timestep): what the loss takes of what `noised` gives."""
    schedule, preset = schedule_of(model.config, run.device), run.preset
    grid = [int((i + 0.5) * schedule.timesteps / FISHER_GRID) for i in range(FISHER_GRID)]
    settings = {
        "data": run.data,
        "device": run.sampling.device,  # another rounds otherwise
        "digits": preset.fisher_digits,
        "grid_digits": preset.fisher_grid_digits,
        "grid": grid,
    }
    weights = model.sha256
    path = run.out / f"{kind}-{weights[:12]}.safetensors"
    kept = distributed.on_first(lambda: _kept_table(path, model, settings, kind))
    image_weights = schedule.image_weights(grid, run.image_variance)
    if kept is not None:
        return replace(kept, image_weights=image_weights)
    digits = run.load_images("train")
    counts = [(1, preset.fisher_digits), *((t, preset.fisher_grid_digits) for t in grid)]
    batches = [(t, prepare(noised(run, digits, [t] * count), t)) for t, count in counts]
    network = model.network().to(run.device)
    table = information.measure(network, loss(schedule), batches, weights, settings, image_weights, kind)
    if distributed.rank() == 0:
        information.save(path, table)
    return table


def _kept_table(path: Path, model: Model, settings: dict, kind: str) -> information.FisherTable | None:
    """What the file holds; None, said in one line, where it has to be made anew."""
    if not path.exists():
        return None
    word = information.WORDS[kind]
    try:
        table = information.load(path, model.sha256, kind)
    except CheckpointError as error:
        print(f"{error}; {word} values are measured anew")
        return None
    if (table.settings, table.timesteps, table.names) == (settings, [1, *settings["grid"]], list(model.state)):
        return table
    print(f"{path} holds {word} values of other settings; they are measured anew")
    return None


def rounding_feedback(run: Run, model: Model) -> dict[str, Feedback]:
    """What rounding by feedback needs to know of the baseline's weights, from real digits: blocks of the Gauss-Newton
    matrix of the predicted noise. Timesteps lie as densely as they weigh in the finished image.
    """
    schedule, network = schedule_of(model.config, run.device), model.network().to(run.device)
    samples = _samples_as_they_weigh(run, schedule, run.preset.fisher_digits)
    signs = random_signs(samples[-1].shape, derive_seed(FISHER_SEED, "signs of feedback")).to(run.device)
    return measure_feedback(network, _signed_noise(schedule), (*samples, signs))


def rounding_inputs(run: Run, model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, t): real digits, noised, timesteps as those of `rounding_feedback`, for rounding layer after layer; as many
    as there, or as have inputs to all layers of INPUT_BYTES."""
    schedule, network = schedule_of(model.config, run.device), model.network().to(run.device)

    def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x0, t, noise = _samples_as_they_weigh(run, schedule, n)
        return schedule.add_noise(x0, t, noise), t

    fit = INPUT_BYTES // sum(x.nbytes for x in exact_inputs(network, inputs(1)).values())
    return inputs(max(1, min(run.preset.fisher_digits, fit)))


def _samples_as_they_weigh(run: Run, schedule: Schedule, n: int) -> tuple[torch.Tensor, ...]:
    """So many of `noised`, whose timesteps lie as densely as they weigh in the finished image."""
    timesteps = schedule.timesteps_at((torch.arange(n) + 0.5) / n, variance=run.image_variance)
    return noised(run, run.load_images("train"), timesteps.tolist())


def training_digits(run: Run) -> torch.Tensor:
    """The digits that --data trains on, (N, C, H, W) in [-1, 1], on the device."""
    return to_model_range(run.load_images("train")).to(run.device)


def noised(run: Run, digits: torch.Tensor, timesteps: list[int]) -> tuple[torch.Tensor, ...]:
    """What `diffusion_loss` takes: some of `digits` (uint8), always the same, timesteps (N,), and noise."""
    generator = torch.Generator().manual_seed(derive_seed(FISHER_SEED, "fisher"))
    chosen, n = torch.randperm(len(digits), generator=generator), len(timesteps)
    x0, seed = to_model_range(digits[chosen[:n]]).to(run.device), derive_seed(FISHER_SEED, "fisher", timesteps[0])
    noise = NoiseStreams(seed, range(n), x0.shape[1:]).draw(run.device)
    return x0, torch.tensor(timesteps, device=run.device), noise


def diffusion_loss(schedule: Schedule) -> SampleLoss:
    def loss(call, x0, t, noise):
        return denoising_loss(call, schedule, x0, t, noise)

    return loss
