"""Models of rounded weights whose output bias and contrast (`common.choose.output_bias`) are measured and put right.

What has to be right on average is the digit that is predicted, after samplers have clipped it to the range of the data.
Errors of either sign leave the mean of the output as it is, but where the digit is black the clipping drops those that
would make it blacker: the ground becomes grey. So the bias is measured after the clipping.

The contrast is measured where the bias is already taken off, and the bias then anew.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.choose.output_bias import CONTRAST, CONTRAST_STEP, MAPS, factor, lacking_contrast
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
BYTES_OF_A_MAP = 470  # about, with its part of the mixture and of the contrast
FINEST = 1e-3  # of a map's steps, as a share of the mean error: finer ones do not pay where all images err alike
FILE_PER_MAP = 100  # a map may take one byte in so many of the file
ROUNDS = 10  # of `clipped_bias`; each leaves the share of the images that are clipped at a pixel


def affordable_maps(limit: int) -> int:
    """How many a file of `limit` bytes can afford."""
    return min(MOST_MAPS, limit // (FILE_PER_MAP * BYTES_OF_A_MAP))


@dataclass(frozen=True)
class OutputBiasFit:
    """What the FP32 baseline predicts of inputs (T, N, C, H, W) at timesteps (T,): outputs of the inputs' shape.
    contrast: whether to correct that too."""

    schedule: Schedule
    inputs: torch.Tensor
    timesteps: torch.Tensor
    outputs: torch.Tensor
    contrast: bool = True

    def correct(self, model: Model, maps: int, limit: float = math.inf) -> Model:
        """The model with so many maps more, which take off the mean error of its output, or as many as a file of
        `limit` bytes has room for: the model itself where that is none."""
        lacks = self._lacks(model)
        larger = (with_maps(model, lacks, count) for count in range(maps, 0, -1))
        return next((model for model in larger if file_bytes(model) <= limit), model)

    def bytes_of(self, model: Model, maps: int) -> int:
        """What so many maps take in the file of a model whose weights have formats of their own."""
        nothing = np.zeros((len(self.timesteps), self.inputs[0, 0].numel()))
        lacks = Lacks(nothing, np.ones(len(nothing)), np.zeros(len(nothing)) if self.contrast else None)
        return file_bytes(with_maps(model, lacks, maps)) - file_bytes(model)

    @torch.inference_mode()
    def _lacks(self, model: Model) -> "Lacks":
        outputs = predict(model.network().to(self.inputs.device), self.inputs, self.timesteps, "bias")
        contrast = np.zeros(len(outputs)) if self.contrast else None
        mean = []
        for i, (x, t, exact) in enumerate(zip(self.inputs, self.timesteps.tolist(), self.outputs, strict=True)):
            bias = clipped_bias(self.schedule, x, t, exact, outputs[i])
            if self.contrast:
                of_each = (self.schedule.predict_x0(x, of, t) for of in (exact, outputs[i] + bias))
                contrast[i] = lacking_contrast(*(x0.flatten(1).double().cpu().numpy() for x0 in of_each))
                outputs[i] += contrast[i] * (outputs[i] - x / self.schedule.noise_level(t))  # as in `OutputBias`
                bias = clipped_bias(self.schedule, x, t, exact, outputs[i])
            mean.append(bias.flatten().double().cpu().numpy())
        errors = (self.outputs - outputs).flatten(2).double().cpu()  # (T, N, D)
        noise = errors.var(1).mean(1).div(errors.shape[1]).sqrt().numpy()
        finest = FINEST * np.sqrt(np.square(mean).mean(1))
        return Lacks(np.stack(mean), np.maximum(noise, finest).clip(min=1e-12), contrast)


@dataclass(frozen=True)
class Lacks:
    """What a model's output lacks: `mean` (T, D) at each timestep and pixel (`clipped_bias`), known to within `noise`
    (T,), the standard error in a typical pixel; and its contrast (T,) (`lacking_contrast`), None: not measured."""

    mean: np.ndarray
    noise: np.ndarray
    contrast: np.ndarray | None


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


def with_maps(model: Model, lacks: Lacks, maps: int) -> Model:
    """The model with so many maps of what it lacks, and the contrast: coded with its weights, or int8 beside fp16 where
    these have formats of their own."""
    codes, steps = factor(lacks.mean, lacks.noise, maps)
    if lacks.contrast is not None:
        codes[CONTRAST] = np.rint(lacks.contrast / CONTRAST_STEP).astype(np.int64)
        steps[CONTRAST] = CONTRAST_STEP
    config = replace(model.config, output_bias=maps, output_contrast=lacks.contrast is not None)
    shapes = {name: shape for name, (shape, _) in tensor_shapes(config).items()}
    codes = {name: of.reshape(shapes[name]) for name, of in codes.items()}
    if model.is_entropy_coded:
        own = {name: shapes[name] for name in tensor_shapes(model.config)}
        stored = entropy.extend(model.stored, own, codes, steps)
        return Model(config, stored, dict.fromkeys(shapes, "entropy"), model.metadata)
    more = {name: torch.from_numpy(of).float() * steps[name] for name, of in codes.items()}
    whole = Model(config, model.stored | more, model.formats | dict.fromkeys(more, "fp32"), model.metadata)
    return whole.quantize([MAPS], "int8", {}).quantize([name for name in more if name != MAPS], "fp16", {})


def measure_outputs(run: Run, baseline: Model) -> OutputBiasFit | None:
    """Of training digits that are noised to the timesteps of `OutputBias`, with other noise at each. None for a network
    of diffusers, which has no place for a bias of its output."""
    if not isinstance(baseline.config, UNetConfig):
        return None
    schedule, digits = schedule_of(baseline.config, run.device), run.load_images("train")
    timesteps = OutputBias.given_at(schedule).to(run.device)
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
