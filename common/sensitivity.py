"""Does Fisher information say which tensors quantization hurts? Each tensor is quantized alone, and the loss measured.

    python -m common.sensitivity --preset quick --formats int8 int4 int2

Prints, for each format, the rank correlation (Spearman) over the weights of layers 1 to 6 between the increase of the
loss on held-out digits and what might predict it; and the increase by layer. Errors: of correlations by the bootstrap
over tensors, of increases over digits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from common.config import FORMATS, positive_int, run_main, script_parser
from common.data import load_digits, to_model_range
from common.device import derive_seed
from common.diffusion import NoiseStreams, Schedule, denoising_loss
from common.layers import layer_of, layer_weights
from common.model import Model, tensor_shapes
from common.quantization import fake_quantize

BOOTSTRAP = 2_000
BATCH = 50


@dataclass(frozen=True)
class Increases:
    """loss: increase for each tensor and digit (tensors, digits) when that tensor alone is quantized; squared_error:
    summed over each tensor's entries (tensors,)."""

    names: list[str]
    loss: np.ndarray
    squared_error: np.ndarray


def digit_losses(network, schedule, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> np.ndarray:
    """(digits,): the loss of each digit at its timestep, with its noise."""
    with torch.inference_mode():
        parts = zip(x0.split(BATCH), t.split(BATCH), noise.split(BATCH), strict=True)
        return torch.cat([denoising_loss(network, schedule, *part).double().cpu() for part in parts]).numpy()


def quantize_each_alone(model: Model, fmt: str, x0, t, noise) -> Increases:
    """The increase of the loss of digits x0 at timesteps t for each weight of layers 1 to 6."""
    network, schedule = model.network().to(x0.device), Schedule(model.config.timesteps)
    before = digit_losses(network, schedule, x0, t, noise)
    parameters, shapes = dict(network.named_parameters()), tensor_shapes(model.config)
    names = layer_weights(model.state)
    losses, errors = [], []
    for name in tqdm(names, desc=fmt, unit="tensor"):
        original = model.state[name]
        quantized = fake_quantize(original, fmt, shapes[name][1])
        with torch.no_grad():
            parameters[name].copy_(quantized)
            losses.append(digit_losses(network, schedule, x0, t, noise) - before)
            parameters[name].copy_(original)
        errors.append(float((quantized - original).double().square().sum()))
    return Increases(names, np.stack(losses), np.array(errors))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation and its standard error, by the bootstrap over pairs."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(a), size=len(a)) for _ in range(BOOTSTRAP)]
    return float(stats.spearmanr(a, b).statistic), float(np.std([stats.spearmanr(a[i], b[i]).statistic for i in draws]))


def format_correlations(increases: dict[str, Increases], fisher: dict[str, np.ndarray]) -> str:
    """One line for each predictor, one column for each format. fisher: {which: values in the order of the names}."""
    lines = [f"{'rank correlation with the increase of the loss':52}" + "".join(f"{fmt:>16}" for fmt in increases)]
    predictors = {f"Fisher, {which}": (values, False) for which, values in fisher.items()}
    predictors |= {f"Fisher, {which}, times squared error": (values, True) for which, values in fisher.items()}
    predictors["squared error alone"] = (1.0, True)
    for label, (values, with_error) in predictors.items():
        cells = []
        for measured in increases.values():
            rho, error = rank_correlation(
                values * (measured.squared_error if with_error else 1.0), measured.loss.mean(1)
            )
            cells.append(f"{f'{rho:.2f} ± {error:.2f}':>16}")
        lines.append(f"{label:52}" + "".join(cells))
    return "\n".join(lines)


def format_layers(increases: dict[str, Increases]) -> str:
    """The increase of the loss of a layer's tensors, summed, x 1e6, for each format."""
    lines = [f"{'increase of the loss x 1e6, sum over the layer':52}" + "".join(f"{fmt:>22}" for fmt in increases)]
    layers = sorted({layer_of(name) for name in next(iter(increases.values())).names})
    for layer in layers:
        cells = []
        for measured in increases.values():
            of_digit = measured.loss[[layer_of(name) == layer for name in measured.names]].sum(0)
            mean, error = 1e6 * of_digit.mean(), 1e6 * of_digit.std(ddof=1) / len(of_digit) ** 0.5
            cells.append(f"{f'{mean:.1f} ± {error:.1f}':>22}")
        lines.append(f"{layer:52}" + "".join(cells))
    return "\n".join(lines)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--formats", choices=FORMATS[1:], nargs="+", default=["int8", "int4", "int2"])
    parser.add_argument("--digits", type=positive_int, default=200, help="held-out digits whose loss is measured")
    options = parser.parse_args()

    from common.baseline import load_baseline
    from common.diffusion_fisher import fisher_table
    from common.run import print_sizes, settle

    if options.digits < 2:
        parser.error("argument --digits: 1 is too few for a standard error; give at least 2")
    run = settle(options)
    if run.dry_run:
        print_sizes(run)
        return
    model = load_baseline(run)
    table = fisher_table(run, model)
    digits = load_digits(run.data, "test", run.data_dir)
    generator = torch.Generator().manual_seed(derive_seed(run.sampling.seed, "sensitivity"))
    x0 = to_model_range(digits[torch.randperm(len(digits), generator=generator)[: options.digits]]).to(run.device)
    noise = NoiseStreams(derive_seed(run.sampling.seed, "sensitivity"), range(len(x0))).draw(run.device)
    t = ((torch.arange(len(x0), device=run.device) + 0.5) * model.config.timesteps / len(x0)).long()
    increases = {fmt: quantize_each_alone(model, fmt, x0, t, noise) for fmt in options.formats}
    names = layer_weights(model.state)
    fisher = {
        which: np.array([table.at(key, names)[name] for name in names])
        for which, key in (("timestep 1", 1), ("all timesteps", "all"), ("by weight in the image", "image"))
    }
    print(f"\n{len(x0)} held-out digits, timesteps spread evenly, {len(names)} weights of layers 1 to 6\n")
    print(format_correlations(increases, fisher) + "\n")
    print(format_layers(increases))


if __name__ == "__main__":
    run_main(main)
