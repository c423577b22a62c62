"""Networks, their training, and what is sampled and measured by default. No torch, so that --help answers at once."""

from dataclasses import dataclass

CHANNEL_FACTORS = (1, 2, 4, 8, 8, 6)  # of layers 1 to 6, for the skips to join
FORMATS = ("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are the published one."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512, 384)
    groups: int = 32
    heads: int = 8
    attention_layers: tuple[int, ...] = (2, 6)
    dropout: float = 0.1  # in the residual blocks, in training
    timesteps: int = 1000

    def __post_init__(self):
        width = self.channels[0]
        if tuple(self.channels) != tuple(width * factor for factor in CHANNEL_FACTORS):
            raise ValueError(f"channels {self.channels}: must be 1, 2, 4, 8, 8, 6 times the first for skips to join")


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
            steps=20_000,
            lr=1e-3,
            muon_lr=5e-3,
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
