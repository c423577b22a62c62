"""Models of rounded weights whose output bias (`common.choose.output_bias`) is measured and taken off.

What has to be right on average is the digit that is predicted, after samplers have clipped it to the range of the data.
Errors of either sign leave the mean of the output as it is, but where the digit is black the clipping drops those that
would make it blacker: the ground becomes grey. So the bias is measured after the clipping.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.choose.output_bias import MAPS, MIXTURE, factor
from common.ddpm.architecture import schedule_of
from common.ddpm.digits import to_model_range
from common.ddpm.noise import NoiseStreams
from common.ddpm.schedule import Schedule
from common.ddpm.unet import OutputBias
from common.formats import entropy
from common.formats.packed import Model, file_bytes, tensor_shapes
from common.presets import UNetConfig
from common.runtime.device import derive_seed
from common.study.run import Run

BATCH = 32
MOST_MAPS = 6
BYTES_OF_A_MAP = 460  # about, with its part of the mixture
FINEST = 1e-3  # of a map's steps, as a share of the mean error: finer ones do not pay where all images err alike
FILE_PER_MAP = 100  # a map may take one byte in so many of the file
ROUNDS = 10  # of `clipped_bias`; each leaves the share of the images that are clipped at a pixel


def affordable_maps(limit: int) -> int:
    """How many a file of `limit` bytes can afford."""
    return min(MOST_MAPS, limit // (FILE_PER_MAP * BYTES_OF_A_MAP))


@dataclass(frozen=True)
class OutputBiasFit:
    """What the FP32 baseline predicts of inputs (T, N, C, H, W) at timesteps (T,): outputs of the inputs' shape."""

    schedule: Schedule
    inputs: torch.Tensor
    timesteps: torch.Tensor
    outputs: torch.Tensor

    def correct(self, model: Model, maps: int, limit: float = math.inf) -> Model:
        """The model with so many maps more, which take off the mean error of its output, or as many as a file of
        `limit` bytes has room for: the model itself where that is none."""
        mean, noise = self._errors(model)
        larger = (with_maps(model, mean, noise, count) for count in range(maps, 0, -1))
        return next((model for model in larger if file_bytes(model) <= limit), model)

    def _errors(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        """What the model's output lacks (`clipped_bias`), (T, D) at each timestep and pixel, and the standard error
        (T,) of its mean in a typical pixel."""
        outputs = predict(model.network().to(self.inputs.device), self.inputs, self.timesteps, "bias")
        at_each = zip(self.inputs, self.timesteps.tolist(), self.outputs, outputs, strict=True)
        mean = torch.stack([clipped_bias(self.schedule, *of).flatten() for of in at_each]).double().cpu()
        errors = (self.outputs - outputs).flatten(2).double().cpu()  # (T, N, D)
        noise = errors.var(1).mean(1).div(errors.shape[1]).sqrt()
        noise = noise.maximum(FINEST * mean.square().mean(1).sqrt()).clamp(min=1e-12)
        return mean.numpy(), noise.numpy()


def clipped_bias(
    schedule: Schedule, x: torch.Tensor, t: int, exact: torch.Tensor, outputs: torch.Tensor
) -> torch.Tensor:
    """(C, H, W): what to add to the predicted noise `outputs` (N, C, H, W) of x at timestep t, so that the digits that
    they imply, clipped, have the mean of those that the `exact` outputs imply. Begins with the mean difference, and
    moves on by what is still missing."""
    wanted, noise_of_x0 = schedule.predict_x0(x, exact, t).mean(0), schedule.noise_ratio(t)
    bias = (exact - outputs).mean(0)
    for _ in range(ROUNDS):
        bias = bias + (schedule.predict_x0(x, outputs + bias, t).mean(0) - wanted) / noise_of_x0
    return bias


def with_maps(model: Model, mean: np.ndarray, noise: np.ndarray, maps: int) -> Model:
    """The model with so many maps of an error's `mean` (T, D), known to within `noise` (T,): coded with its weights, or
    int8 beside fp16 where these have formats of their own."""
    codes, steps = factor(mean, noise, maps)
    config = replace(model.config, output_bias=maps)
    shapes = {name: shape for name, (shape, _) in tensor_shapes(config).items()}
    codes = {name: of.reshape(shapes[name]) for name, of in codes.items()}
    if model.is_entropy_coded:
        own = {name: shapes[name] for name in tensor_shapes(model.config)}
        stored = entropy.extend(model.stored, own, codes, steps)
        return Model(config, stored, dict.fromkeys(shapes, "entropy"), model.metadata)
    more = {name: torch.from_numpy(of).float() * steps[name] for name, of in codes.items()}
    whole = Model(config, model.stored | more, model.formats | dict.fromkeys(more, "fp32"), model.metadata)
    return whole.quantize([MAPS], "int8", {}).quantize([MIXTURE], "fp16", {})


def measure_outputs(run: Run, baseline: Model) -> OutputBiasFit | None:
    """Of training digits that are noised to the timesteps of `OutputBias`, with other noise at each. None for a network
    of diffusers, which has no place for a bias of its output."""
    if not isinstance(baseline.config, UNetConfig):
        return None
    schedule, digits = schedule_of(baseline.config, run.device), run.load_images("train")
    timesteps = torch.tensor(schedule.spaced_timesteps(OutputBias.GRID)[::-1], device=run.device).clamp(min=0)
    seed, count = derive_seed(0, "output bias"), max(2, run.preset.fisher_grid_digits)
    chosen = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))[:count]
    x0 = to_model_range(digits[chosen]).to(run.device)
    streams = NoiseStreams(seed, range(len(x0)), x0.shape[1:])
    inputs = torch.stack([schedule.add_noise(x0, t.expand(len(x0)), streams.draw(run.device)) for t in timesteps])
    outputs = predict(baseline.network().to(run.device), inputs, timesteps, "FP32 outputs")
    return OutputBiasFit(schedule, inputs, timesteps, outputs)


@torch.inference_mode()
def predict(network: nn.Module, inputs: torch.Tensor, timesteps: torch.Tensor, label: str) -> torch.Tensor:
    """The network's outputs for inputs (T, N, C, H, W) at timesteps (T,), of the same shape; shows a progress bar."""
    bar = tqdm(zip(inputs, timesteps, strict=True), desc=label, total=len(inputs), unit="timestep")
    network = network.to(memory_format=torch.channels_last)
    return torch.stack([torch.cat([network(part, t.expand(len(part))) for part in x.split(BATCH)]) for x, t in bar])
