"""The options that scripts share, their types and errors. No torch, so that --help answers at once."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import is_first_process
from common.presets import FORMATS, PRECISIONS, PRESETS

MOST_IMAGES = 10_000_000
LARGEST_SEED = 2**64 - 1  # keys of the noise are of 64 bits
DIGITS = ("mnist", "mnist5k")  # that come with the software, or by themselves
METRICS = ("mnist", "inception", "random")  # whose features images are compared by
CURVATURES = ("fisher", "gauss-newton")  # the loss's mean squared gradient, or the curvature of its squared error
# How Fisher values are averaged over timesteps: those of timestep 1 alone, all alike, or by what an error of the
# predicted noise does to the finished image.
TIMESTEP_WEIGHTINGS = ("first", "uniform", "image")
FORMER_WEIGHTINGS = {"1": "first", "all": "uniform", "image": "image"}  # of --fisher-timestep, until version 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit code 2."""

    def __init__(self, **kwargs):
        kwargs.setdefault("prog", Path(sys.argv[0]).name)
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show where an error arose, not one line alone")

    def parse_args(self, args=None, namespace=None):
        """As argparse does; but an option that is given twice is an error, not the last one's value."""
        args = sys.argv[1:] if args is None else args
        given = [text.partition("=")[0] for text in args if text.startswith("--")]
        for option in given:
            if given.count(option) > 1 and option in self._option_string_actions:
                self.error(f"argument {option}: is given {given.count(option)} times; give it once")
        return super().parse_args(args, namespace)

    def _print_message(self, message, file=None):
        """As argparse does; but help that cannot be written is an error."""
        print(message, end="", file=file or sys.stderr, flush=True)

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            message += "; --help lists the options"
        self.exit(2, f"{self.prog}: error: {message}\n" if is_first_process() else None)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any, and the examples of the docstring as they are written."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number in low..high, in the digits 0 to 9."""

    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 30 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {low} to {high}")
        return int(text)

    return parse


positive_int = whole_number(1, 1_000_000_000)


def bounded_float(low: float, high: float, example: float) -> Callable[[str], float]:
    """An argparse type: a number in low..high; the error shows an example."""

    def parse(text: str) -> float:
        try:
            value = float(text) if text.isascii() and not set(text) & set("_ \t\n") else math.nan
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number in {low:g}..{high:g}; give one such as {example:g}"
            )
        return value

    return parse


def file_name(text: str) -> Path:
    """An argparse type: the name of a file or folder."""
    if not text.strip() or set(text) & set("\0\n\r") or any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file or folder")
    return Path(text)


def data_name(text: str) -> str | Path:
    """An argparse type: the name of digits that come with the software, or a folder."""
    return text if text in DIGITS else file_name(text)


def number(value: float) -> str:
    """The shortest text that is this number and no other: labels of two numbers differ."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def script_parser(description: str, *, formats: bool = False, fisher: bool = False, samples: bool = True) -> Parser:
    """The options that the scripts share, with --format, --timestep-weighting and those of sampling where they are
    used.

    Defaults of None are filled from the preset by `run.resolve`.
    """
    parser = Parser(description=description)
    model = parser.add_argument_group("model and data")
    model.add_argument("--preset", choices=PRESETS, help="default: paper where CUDA is available, else quick")
    model.add_argument("--checkpoint", type=file_name, metavar="FILE", help="default: checkpoints/<preset>.safetensors")
    model.add_argument(
        "--model", type=file_name, metavar="DIR", help="a UNet2DModel of diffusers in place of a preset; needs --data"
    )
    model.add_argument(
        "--data",
        type=data_name,
        metavar="mnist|mnist5k|FOLDER",
        help="default: what the preset trains on; with --model, a folder of png, jpg or webp images, of which a fifth "
        "is held out by a hash of their names",
    )
    model.add_argument("--data-dir", type=file_name, default=Path("data"), metavar="DIR", help="holds MNIST/raw")
    model.add_argument("--device", default=None, help="cpu, cuda or cuda:N; default: cuda where available, else cpu")
    model.add_argument(
        "--seed",
        type=whole_number(0, LARGEST_SEED),
        default=0,
        metavar="N",
        help="seed of the sampling: the noise of image i depends on (seed, i) alone",
    )
    parser.set_defaults(format="fp16", timestep_weighting="first", curvature="fisher")
    if formats or fisher:
        _add_quantization(parser.add_argument_group("quantization"), formats, fisher)
    parser.set_defaults(
        samples=samples, images=None, seeds=1, sampler=None, steps=None, eta=None, batch_size=None, precision="fp32",
        metric=None, inception_weights=None, engine="torch",
    )  # fmt: skip
    if samples:
        _add_sampling(parser.add_argument_group("sampling"))
        metrics = parser.add_argument_group("metrics")
        metrics.add_argument(
            "--metric",
            choices=METRICS,
            help="the features that FID, KID and score use; default: mnist for digits; for other images inception if "
            "its weights are there and there are enough images, else random, a fixed network of random weights",
        )
        metrics.add_argument("--inception-weights", type=file_name, metavar="FILE", help="default: download them")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=file_name,
        metavar="DIR",
        help="default: results/<preset>, or results/ and the name of the --model",
    )
    output.add_argument("--dry-run", action="store_true", help="print configuration, sizes and cost; run nothing")
    return parser


def _add_quantization(group, formats: bool, fisher: bool) -> None:
    if formats:
        group.add_argument("--format", choices=FORMATS[1:], help="the format of the tensors that are quantized")
    if fisher:
        group.add_argument(
            "--timestep-weighting",
            choices=TIMESTEP_WEIGHTINGS,
            help="Fisher values at timestep 1; their mean over 20 timesteps; or that mean, each timestep weighted by "
            "what an error there does to the finished image",
        )
        group.add_argument(
            "--fisher-timestep",
            dest="timestep_weighting",
            type=_former_weighting,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _former_weighting(text: str) -> str:
    """An argparse type: what --timestep-weighting is called where --fisher-timestep, its name until version 2, says
    it."""
    if text not in FORMER_WEIGHTINGS:
        raise argparse.ArgumentTypeError(f"{text!r}: is now --timestep-weighting {'|'.join(TIMESTEP_WEIGHTINGS)}")
    return FORMER_WEIGHTINGS[text]


def _add_sampling(group) -> None:
    group.add_argument(
        "--images", type=whole_number(1, MOST_IMAGES), metavar="N", help="images per model; default: the preset's"
    )
    group.add_argument(
        "--seeds",
        type=whole_number(1, 1000),
        metavar="N",
        help="draw the images N times, with consecutive seeds; a row has the mean over the draws",
    )
    group.add_argument(
        "--sampler",
        choices=("ddpm", "ddim", "dpm++"),
        help="default: the preset's; with --eta ddim; with --steps dpm++ in place of ddpm",
    )
    group.add_argument(
        "--steps", type=positive_int, metavar="N", help="of ddim and dpm++; default: the preset's; ddpm takes all 1000"
    )
    group.add_argument(
        "--eta", type=bounded_float(0, 1, 0.5), metavar="ETA", help="fresh noise of DDIM, 0..1; default: the preset's"
    )
    group.add_argument(
        "--batch-size",
        type=whole_number(1, 100_000),
        metavar="N",
        help="images sampled at once; default: 50 on a CPU, 250 on CUDA",
    )
    group.add_argument(
        "--engine", choices=("torch", "openvino"), help="what runs the network; openvino: CPU, installed separately"
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the network when sampling; with openvino only: int8, weights and activations in 8 bits; mixed, the "
        "same with the layers that this costs most in bf16",
    )


def strategy_parser(description: str, *, formats: bool = True) -> Parser:
    """`script_parser`, and what the scripts of the rules share."""
    parser = script_parser(description, formats=formats, fisher=True)
    parser.add_argument(
        "--curvature",
        choices=CURVATURES,
        default="fisher",
        help="the values that decide: fisher, mean squared gradients of the loss; or gauss-newton, which say by how "
        "much an error dw of a weight raises the loss, in units of dw^2",
    )
    parser.add_argument(
        "--controls",
        type=whole_number(1, 1000),
        metavar="N",
        help="compare each row with N permutations of its Fisher values, say 20; adds rows of 2 of these, and of "
        "choices that use no Fisher values",
    )
    return parser
