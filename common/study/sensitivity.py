"""Does Fisher information say which tensors quantization hurts? Each tensor is quantized alone, and the loss measured.

    python -m common sensitivity --preset quick --formats int8 int4 int2
    python -m common report --preset quick --sensitivity      # the tables again, from <out>/sensitivity.jsonl

Prints, for each format, the rank correlation (Spearman) over the weights of layers 1 to 6 between the increase of the
loss on held-out digits and what might predict it; and the increase by layer. Errors: of correlations by the bootstrap
over tensors, of increases over digits.
"""

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from common.choose.layers import layer_of, layer_weights
from common.ddpm.digits import load_digits, to_model_range
from common.ddpm.noise import NoiseStreams
from common.ddpm.schedule import Schedule, denoising_loss
from common.errors import UserError
from common.formats.numbers import fake_quantize, stored_format
from common.formats.packed import Model, tensor_shapes
from common.options import positive_int, script_parser
from common.presets import FORMATS
from common.runtime.device import derive_seed
from common.runtime.files import write_atomically
from common.runtime.sealed import shorten

FILE = "sensitivity.jsonl"  # in --out
BOOTSTRAP = 2_000
BATCH = 50


@dataclass(frozen=True)
class Increases:
    """What quantizing each of `names` alone did in one format.

    mean: increase of the loss; squared_error: summed over the tensor's entries; fisher: {which: values}, all in the
    order of `names`. layers: {layer: (sum of its tensors' increases, standard error over digits)}.
    """

    format: str
    names: list[str]
    mean: list[float]
    squared_error: list[float]
    fisher: dict[str, list[float]]
    layers: dict[str, tuple[float, float]]


def digit_losses(network, schedule, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> np.ndarray:
    """(digits,): the loss of each digit at its timestep, with its noise."""
    with torch.inference_mode():
        parts = zip(x0.split(BATCH), t.split(BATCH), noise.split(BATCH), strict=True)
        return torch.cat([denoising_loss(network, schedule, *part).double().cpu() for part in parts]).numpy()


def quantize_each_alone(model: Model, fmt: str, fisher: dict[str, dict[str, float]], x0, t, noise) -> Increases:
    """The increase of the loss of digits x0 at timesteps t for each weight of layers 1 to 6.

    fisher: {which: {name: value}}, what may predict it.
    """
    network, schedule = model.network().to(x0.device), Schedule(model.config.timesteps, x0.device)
    before = digit_losses(network, schedule, x0, t, noise)
    parameters, shapes = dict(network.named_parameters()), tensor_shapes(model.config)
    names = layer_weights(model.state)
    losses, errors = {}, []
    for name in tqdm(names, desc=fmt, unit="tensor"):
        original = model.state[name]
        quantized = fake_quantize(original, stored_format(fmt, original.shape), shapes[name][1])
        with torch.no_grad():
            parameters[name].copy_(quantized)
            losses[name] = digit_losses(network, schedule, x0, t, noise) - before
            parameters[name].copy_(original)
        errors.append(float((quantized - original).double().square().sum()))
    layers = {}
    for layer in sorted(set(map(layer_of, names))):
        of_digit = sum(losses[name] for name in names if layer_of(name) == layer)
        layers[layer] = (float(of_digit.mean()), float(of_digit.std(ddof=1) / len(of_digit) ** 0.5))
    means = [float(losses[name].mean()) for name in names]
    return Increases(fmt, names, means, errors, {which: [v[n] for n in names] for which, v in fisher.items()}, layers)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation and its standard error, by the bootstrap over pairs."""
    rng = np.random.default_rng(0)
    draws = np.stack([rng.integers(len(a), size=len(a)) for _ in range(BOOTSTRAP)])
    return float(_spearman(a, b)), float(_spearman(a[draws], b[draws]).std())


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis, of all rows at once; nan where all of a row are alike."""
    a, b = (stats.rankdata(x, axis=-1) for x in (a, b))
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def format_correlations(measured: list[Increases]) -> str:
    """One line for each predictor, one column for each format."""
    predictors = {}
    for which in measured[0].fisher:
        predictors[f"Fisher, {which}"] = lambda m, which=which: np.array(m.fisher[which])
    for which in measured[0].fisher:
        predictors[f"Fisher, {which}, times squared error"] = lambda m, which=which: (
            np.array(m.fisher[which]) * m.squared_error
        )
    predictors["squared error alone"] = lambda m: np.array(m.squared_error)
    lines = [f"{'rank correlation with the increase of the loss':52}" + "".join(f"{m.format:>16}" for m in measured)]
    for label, predictor in predictors.items():
        cells = ["{:.2f} ± {:.2f}".format(*rank_correlation(predictor(m), np.array(m.mean))) for m in measured]
        lines.append(f"{label:52}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def format_layers(measured: list[Increases]) -> str:
    """The increase of the loss of a layer's tensors, summed, x 1e6, for each format."""
    lines = [f"{'increase of the loss x 1e6, sum over the layer':52}" + "".join(f"{m.format:>22}" for m in measured)]
    for layer in measured[0].layers:
        cells = ["{:.1f} ± {:.1f}".format(*(1e6 * x for x in m.layers[layer])) for m in measured]
        lines.append(f"{layer:52}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _increases(line: dict) -> Increases:
    """A line of the file. Raises ValueError or TypeError where it is not one that `main` writes."""
    measured = Increases(**line)
    if measured.format not in FORMATS or not all(isinstance(name, str) for name in measured.names):
        raise ValueError("a format or a name is not one")
    per_name = [measured.mean, measured.squared_error, *measured.fisher.values()]
    if any(len(numbers) != len(measured.names) for numbers in per_name):
        raise ValueError("its lists are not of one length")
    if any(len(pair) != 2 for pair in measured.layers.values()):
        raise ValueError("a layer has not two numbers")
    for number in itertools.chain(*per_name, *measured.layers.values()):
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{number!r} is not a finite number")
    return measured


def _refuse(constant: str):
    raise ValueError(f"{constant} is not a number")


def format_sensitivity(path: Path) -> str:
    """The tables of the file that `main` writes. Raises UserError where it is missing or damaged."""
    try:
        header, *lines = [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]
        measured = [_increases(line) for line in lines]
        if len({(tuple(m.names), tuple(m.fisher), tuple(m.layers)) for m in measured}) > 1:
            raise ValueError("its lines are of different measurements")
        title = (
            "Preset {preset}, baseline {baseline:.8}; {digits} held-out digits of {data}, timesteps spread evenly, "
            "seed {seed}; each of {tensors} weights of layers 1 to 6 quantized alone; errors: 1 standard error"
        ).format(**header, tensors=len(measured[0].names))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); python -m common sensitivity makes it") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({shorten(error)}); delete it and measure again"
        ) from None
    return f"\n{title}\n\n{format_correlations(measured)}\n\n{format_layers(measured)}"


def main():
    parser = script_parser(__doc__, samples=False)
    parser.add_argument("--formats", choices=FORMATS[1:], nargs="+", default=["int8", "int4", "int2"])
    parser.add_argument("--digits", type=positive_int, default=200, help="held-out digits whose loss is measured")
    options = parser.parse_args()

    from common.runtime import distributed
    from common.study.baselines import load_baseline
    from common.study.diffusion_fisher import fisher_table
    from common.study.run import start

    if options.digits < 2:
        parser.error("argument --digits: 1 is too few for a standard error; give at least 2")
    run = start(options)
    digits = load_digits(run.data, "test", run.data_dir)
    if options.digits > len(digits):
        raise UserError(
            f"--digits {options.digits}: there are {len(digits)} test digits in {run.data}; give at most as many"
        )
    model = load_baseline(run)
    table = fisher_table(run, model)
    generator = torch.Generator().manual_seed(derive_seed(run.sampling.seed, "sensitivity"))
    x0 = to_model_range(digits[torch.randperm(len(digits), generator=generator)[: options.digits]]).to(run.device)
    noise = NoiseStreams(derive_seed(run.sampling.seed, "sensitivity"), range(len(x0))).draw(run.device)
    t = ((torch.arange(len(x0), device=run.device) + 0.5) * model.config.timesteps / len(x0)).long()
    names = layer_weights(model.state)
    fisher = {
        which: table.at(key, names)
        for which, key in (("timestep 1", "first"), ("all timesteps", "uniform"), ("by weight in the image", "image"))
    }
    header = {
        "preset": run.preset_name,
        "baseline": model.sha256,
        "data": run.data,
        "digits": len(x0),
        "seed": run.sampling.seed,
    }
    formats = dict.fromkeys(options.formats)  # each once
    lines = [header, *(asdict(quantize_each_alone(model, fmt, fisher, x0, t, noise)) for fmt in formats)]
    path = run.out / FILE
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    distributed.on_first(lambda: write_atomically(path, content))
    print(format_sensitivity(path))
    print(f"\nkept in {path}")
