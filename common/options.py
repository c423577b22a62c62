"""The options that all scripts share. No torch, so that --help and errors in options answer at once."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import is_first_process
from common.presets import FORMATS, PRESETS


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit code 2."""

    def __init__(self, **kwargs):
        kwargs.setdefault("prog", Path(sys.argv[0]).name)
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
