"""Increases of the loss where tensors are quantized: the file that holds them, and its tables."""

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

from common.errors import UserError
from common.presets import FORMATS
from common.runtime.sealed import shorten
from common.study.rows import kind_of

FILE = "sensitivity.jsonl"  # in --out
BOOTSTRAP = 2_000
EVEN = "all timesteps"  # the mean over timesteps that weigh alike, as they do where increases are measured


@dataclass(frozen=True)
class Increases:
    """What quantizing each of `names` alone did in one format.

    mean: increase of the loss, error: its standard error over digits; squared_error: summed over the tensor's entries;
    fisher, gauss_newton: {which timesteps: values}; all in the order of `names`. layers: {layer: (sum of its tensors'
    increases, standard error over digits)}; together: the same of the network with all of `names` quantized.

    Files of earlier versions lack error, gauss_newton and together, and their Fisher values are divided by the largest.
    """

    format: str
    names: list[str]
    mean: list[float]
    squared_error: list[float]
    fisher: dict[str, list[float]]
    layers: dict[str, tuple[float, float]]
    error: list[float] = field(default_factory=list)
    gauss_newton: dict[str, list[float]] = field(default_factory=dict)
    together: tuple[float, float] | None = None

    def predicted(self) -> dict[str, np.ndarray]:
        """{how: the predicted increase of the loss for each tensor}; empty for a file of an earlier version.

        Gauss-Newton: see `common.fisher.gauss_newton`. Half of F dw^2 is what it would be if the Fisher information F
        were the Hessian, which it is of a negative log-likelihood, and not of a mean of squared errors.
        """
        if not self.gauss_newton:
            return {}
        squared_error = np.array(self.squared_error)
        return {
            "Gauss-Newton": np.array(self.gauss_newton[EVEN]) * squared_error,
            "Fisher / 2": np.array(self.fisher[EVEN]) * squared_error / 2,
        }


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
    kinds = {"Fisher": lambda m: m.fisher, "Gauss-Newton": lambda m: m.gauss_newton}
    for kind, of in kinds.items():
        for which in of(measured[0]):
            predictors[f"{kind}, {which}"] = lambda m, of=of, which=which: np.array(of(m)[which])
        for which in of(measured[0]):
            predictors[f"{kind}, {which}, times squared error"] = lambda m, of=of, which=which: (
                np.array(of(m)[which]) * m.squared_error
            )
    predictors["squared error alone"] = lambda m: np.array(m.squared_error)
    lines = [f"{'rank correlation with the increase of the loss':58}" + "".join(f"{m.format:>16}" for m in measured)]
    for label, predictor in predictors.items():
        cells = ["{:.2f} ± {:.2f}".format(*rank_correlation(predictor(m), np.array(m.mean))) for m in measured]
        lines.append(f"{label:58}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def format_layers(measured: list[Increases]) -> str:
    """The increase of the loss of a layer's tensors, summed, x 1e6, for each format."""
    lines = [f"{'increase of the loss x 1e6, sum over the layer':52}" + "".join(f"{m.format:>22}" for m in measured)]
    for layer in measured[0].layers:
        cells = ["{:.1f} ± {:.1f}".format(*(1e6 * x for x in m.layers[layer])) for m in measured]
        lines.append(f"{layer:52}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def format_predictions(measured: Increases) -> str:
    """The increase of the loss of each tensor, x 1e6, and what was predicted; then of all together."""
    columns = {
        "measured": [*zip(measured.mean, measured.error, strict=True), measured.together],
        **{how: [*values, values.sum()] for how, values in measured.predicted().items()},
    }
    lines = [f"{f'increase of the loss x 1e6, {measured.format}':52}" + "".join(f"{name:>24}" for name in columns)]
    for i, name in enumerate([*measured.names, "all of them together"]):
        cells = []
        for values in columns.values():
            value = np.atleast_1d(values[i])
            cells.append(" ± ".join(f"{1e6 * x:,.{1 if len(value) > 1 else 2}f}" for x in value))
        lines.append(f"{name:52}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _increases(line: dict) -> Increases:
    """A line of the file. Raises ValueError or TypeError where it is not one that `main` writes."""
    measured = Increases(**line)
    if measured.format not in FORMATS or not all(isinstance(name, str) for name in measured.names):
        raise ValueError("a format or a name is not one")
    per_name = [measured.mean, measured.squared_error, *measured.fisher.values(), *measured.gauss_newton.values()]
    if measured.gauss_newton:
        per_name += [measured.error, measured.fisher[EVEN], measured.gauss_newton[EVEN]]
    if any(len(numbers) != len(measured.names) for numbers in per_name):
        raise ValueError("its lists are not of one length")
    pairs = [*measured.layers.values(), *([measured.together] if measured.gauss_newton else [])]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("an increase has not two numbers")
    for number in itertools.chain(*per_name, *pairs):
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{number!r} is not a finite number")
    return measured


def _refuse(constant: str):
    raise ValueError(f"{constant} is not a number")


def format_sensitivity(path: Path) -> str:
    """The tables of the file at `path`. Raises UserError where it is missing or damaged."""
    title, measured = read_increases(path)
    tables = [format_correlations(measured), format_layers(measured)]
    tables += [format_predictions(m) for m in measured if m.gauss_newton]
    return "\n\n".join([f"\n{title}", *tables])


def read_increases(path: Path) -> tuple[str, list[Increases]]:
    """What the file that `python -m common sensitivity` writes holds: a line that says what was measured how, and the
    increases in each format. Raises UserError where it is missing or damaged."""
    if path.exists() and not path.is_file():  # reading a pipe would not end
        raise UserError(f"{path}: is not a file; move it away; python -m common sensitivity makes it")
    try:
        header, *lines = [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]
        measured = [_increases(line) for line in lines]
        if len({tuple(map(tuple, (m.names, m.fisher, m.gauss_newton, m.layers))) for m in measured}) > 1:
            raise ValueError("its lines are of different measurements")
        title = (
            "{kind} {preset}, baseline {baseline:.8}; {digits} held-out images of {data}, timesteps spread evenly, "
            "seed {seed}; each of {tensors} weights of the layers quantized alone; errors: 1 standard error"
        ).format(**header, kind=kind_of(str(header["preset"])), tensors=len(measured[0].names))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); python -m common sensitivity makes it") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({shorten(error)}); delete it and measure again"
        ) from None
    return title, measured
