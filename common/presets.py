"""Networks, their training, and what is sampled and measured by default. No torch, so that --help answers at once."""

from dataclasses import dataclass
from typing import ClassVar

CHANNEL_FACTORS = (1, 2, 4, 8, 8, 6)  # of layers 1 to 6, for the skips to join
FORMATS = ("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")
# Of integers: to the nearest, with scales that reach the largest weight (as published), or with scales of least squared
# error; or with these, each error made good by the weights that are rounded later.
ROUNDINGS = ("nearest", "least-error", "feedback")
PRECISIONS = ("fp32", "bf16", "int8", "mixed")  # of products when sampling; the latter two by OpenVINO alone


# Bounds of what a file may claim; a network that fills them takes more memory than a machine has.
LARGEST_WIDTH = 2048  # of the first layer, 64 in the published network
LARGEST_TIMESTEPS = 10_000
LARGEST_OUTPUT_BIAS = 64


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are the published one.

    Raises ValueError naming the field whose value makes no network.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512, 512, 384)
    groups: int = 32
    heads: int = 8
    attention_layers: tuple[int, ...] = (2, 6)
    dropout: float = 0.1  # in the residual blocks, in training
    timesteps: int = 1000
    output_bias: int = 0  # images of which a mixture, by timestep, is added to a quantized network's output
    output_contrast: bool = False  # beside such images, whether its digits are moved away from their mean
    image_shape: ClassVar[tuple[int, int, int]] = (1, 32, 32)  # (channels, height, width)

    def __post_init__(self):
        _require_integers("channels", self.channels, 1, LARGEST_WIDTH * max(CHANNEL_FACTORS))
        _require_integers("attention_layers", self.attention_layers, 1, len(CHANNEL_FACTORS))
        _require_integers("groups, heads", (self.groups, self.heads), 1, LARGEST_WIDTH)
        _require_integers("timesteps", (self.timesteps,), 1, LARGEST_TIMESTEPS)
        _require_integers("output_bias", (self.output_bias,), 0, LARGEST_OUTPUT_BIAS)
        if self.output_contrast is not False and (self.output_contrast is not True or not self.output_bias):
            raise ValueError(f"output_contrast {self.output_contrast!r:.60}: must be false, or true beside output_bias")
        width = self.channels[0] if self.channels else 0
        if self.channels != tuple(width * factor for factor in CHANNEL_FACTORS):
            raise ValueError(f"channels {self.channels}: must be 1, 2, 4, 8, 8, 6 times the first for skips to join")
        if len(set(self.attention_layers)) < len(self.attention_layers):
            raise ValueError(f"attention_layers {self.attention_layers}: a layer has attention once")
        if width % self.groups:
            raise ValueError(f"groups {self.groups}: must divide the {width} channels of layer 1")
        for attended in (self.channels[layer - 1] for layer in self.attention_layers):
            if attended % self.heads:
                raise ValueError(f"heads {self.heads}: must divide the {attended} channels of a layer with attention")
        if type(self.dropout) not in (float, int) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout!r:.60}: must be a number from 0 to below 1")


def _require_integers(field: str, values: tuple[int, ...], lowest: int, highest: int) -> None:
    if type(values) is not tuple or not all(type(value) is int and lowest <= value <= highest for value in values):
        raise ValueError(f"{field} {values!r:.60}: must be whole numbers from {lowest} to {highest}")


@dataclass(frozen=True)
class TrainingConfig:
    """One training run: `steps` optimizer steps of `batch_size` digits."""

    data: str
    batch_size: int
    steps: int
    lr: float  # of Adam
    muon_lr: float
    warmup_steps: int
    ema: float
    image_share: float  # of the timesteps, drawn as they weigh in the finished image; the rest uniformly
    gradient_clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Preset:
    """A network, its training, and what is sampled and measured by default."""

    network: UNetConfig
    training: TrainingConfig
    images: int
    sampler: str
    steps: int  # of the samplers that take fewer than all
    eta: float  # of DDIM: 0 deterministic, 1 as much fresh noise as the ancestral sampler
    fisher_digits: int  # at timestep 1
    fisher_grid_digits: int  # at each timestep of the grid


# Without dropout: networks that see so few digits are not expected to overfit (not compared).
PRESETS = {
    "paper": Preset(
        network=UNetConfig(dropout=0.0),
        training=TrainingConfig(
            data="mnist",
            batch_size=64,
            steps=12_000,
            lr=5e-4,
            muon_lr=1.5e-3,  # with 5e-3 the loss rose from step 2,000 on (docs/paper.md)
            warmup_steps=100,
            ema=0.998,
            image_share=0.75,
        ),
        images=5_000,
        sampler="ddpm",
        steps=50,
        eta=1.0,
        fisher_digits=512,
        fisher_grid_digits=128,
    ),
    "quick": Preset(
        network=UNetConfig(channels=(16, 32, 64, 128, 128, 96), groups=16, heads=4, dropout=0.0),
        training=TrainingConfig(
            data="mnist5k",
            batch_size=64,
            steps=16_000,
            lr=2e-3,
            muon_lr=5e-3,
            warmup_steps=100,
            ema=0.999,
            image_share=0.75,
        ),
        images=1_000,
        sampler="dpm++",
        steps=20,
        eta=1.0,
        fisher_digits=512,
        fisher_grid_digits=128,
    ),
}
