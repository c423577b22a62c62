"""Presets, and the options that all scripts share.

Nothing here imports torch, so that --help and errors in options answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHANNEL_FACTORS = (1, 2, 4, 8, 8, 6)  # of layers 1 to 6, for the skips to join
FORMATS = ("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")


def is_first_process() -> bool:
    """False in the second and later processes that torchrun starts."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


class UserError(ValueError):
    """Bad input or surroundings: shown as one line, without a traceback."""


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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n" if is_first_process() else None)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any, and the examples of the docstring as they are written."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def bounded_float(low: float, high: float, example: float) -> Callable[[str], float]:
    """An argparse type: a number in low..high; the error shows an example."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number in {low:g}..{high:g}; give one such as {example:g}"
            )
        return value

    return parse


def script_parser(description: str, quantizes: bool = True, samples: bool = True) -> Parser:
    """The options that the scripts share; without those of quantization or of sampling for scripts that do neither.

    Defaults of None are filled from the preset by `run.settle`.
    """
    parser = Parser(description=description)
    model = parser.add_argument_group("model and data")
    model.add_argument("--preset", choices=PRESETS, help="default: paper where CUDA is available, else quick")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: checkpoints/<preset>.safetensors")
    model.add_argument("--data", choices=("mnist", "mnist5k"), help="default: what the preset trains on")
    model.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="holds MNIST/raw")
    model.add_argument("--device", default=None, help="cpu, cuda or cuda:N; default: cuda where available, else cpu")
    model.add_argument(
        "--seed", type=int, default=0, help="of the sampling: the noise of image i depends on (seed, i) alone"
    )
    parser.set_defaults(format="fp16", fisher_timestep="1")
    if quantizes:
        _add_quantization(parser.add_argument_group("quantization"))
    parser.set_defaults(
        samples=samples, images=None, sampler=None, steps=None, eta=None, batch_size=None, precision="fp32",
        metric="mnist", inception_weights=None,
    )  # fmt: skip
    if samples:
        _add_sampling(parser.add_argument_group("sampling"))
        metrics = parser.add_argument_group("metrics")
        metrics.add_argument("--metric", choices=("mnist", "inception"), help="whose features FID, KID and score use")
        metrics.add_argument("--inception-weights", type=Path, metavar="FILE", help="default: download them")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="default: results/<preset>")
    output.add_argument("--dry-run", action="store_true", help="print configuration, sizes and cost; run nothing")
    return parser


def _add_quantization(group) -> None:
    group.add_argument("--format", choices=FORMATS[1:], help="what tensors become that are quantized")
    group.add_argument(
        "--fisher-timestep",
        choices=("1", "all", "image"),
        help="Fisher values of timestep 1, their mean over all, or that weighted by what an error does to the image",
    )


def _add_sampling(group) -> None:
    group.add_argument("--images", type=positive_int, metavar="N", help="of each model; default: the preset's")
    group.add_argument("--sampler", choices=("ddpm", "ddim", "dpm++"), help="default: the preset's")
    group.add_argument(
        "--steps", type=positive_int, metavar="N", help="of ddim and dpm++; default: the preset's; ddpm takes all 1000"
    )
    group.add_argument(
        "--eta", type=bounded_float(0, 1, 0.5), metavar="ETA", help="fresh noise of DDIM, 0..1; default: the preset's"
    )
    group.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="images sampled at once; default: 50 on a CPU, 250 on CUDA"
    )
    group.add_argument("--precision", choices=("fp32", "bf16"), help="of the network when sampling")


def strategy_parser(description: str) -> Parser:
    """`script_parser`, and what the scripts of the rules share."""
    parser = script_parser(description)
    parser.add_argument(
        "--controls",
        type=positive_int,
        metavar="N",
        help="after each row, rows of its size without Fisher information: N random choices, by magnitude, uniform",
    )
    return parser


def run_main(main: Callable[[], None]) -> None:
    """Runs a script's main; a UserError becomes one line and exit code 1.

    Where torchrun started several processes, the first speaks for all.
    """
    if not is_first_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}" if is_first_process() else 1)
    except OSError as error:  # a full disk, a folder that vanished: may be of one process, and needs no traceback
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        if not is_first_process():
            sys.exit(1)
        sys.exit("interrupted; training and sampling continue where they stopped when the command is given again")
