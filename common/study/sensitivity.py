"""Does Fisher information say which tensors quantization hurts? Each tensor is quantized alone, and the loss measured.

    python -m common sensitivity --preset quick --formats int8 int4 int2
    python -m common report --preset quick --sensitivity      # the tables again, from <out>/sensitivity.jsonl

For each format it prints three things, over the weight tensors of layers 1 to 6. First, the rank correlations
(Spearman) of the increase of the loss on held-out images with what might predict it. Second, the increase by layer.
Third, the increase of each tensor, and of all quantized together, beside what Gauss-Newton values and half the Fisher
values predict. Errors of correlations come from the bootstrap over tensors, those of increases from the spread over
images.
"""

import json
from dataclasses import asdict

import torch
from tqdm import tqdm

from common.choose.layers import layer_of, layer_weights, layers_in_order
from common.ddpm.architecture import schedule_of
from common.errors import UserError
from common.formats.numbers import fake_quantize, stored_format
from common.formats.packed import Model, tensor_shapes
from common.options import positive_int, script_parser
from common.presets import FORMATS
from common.runtime.files import write_atomically
from common.study.held_out import digit_losses, held_out, mean_and_error
from common.study.increases import EVEN, FILE, Increases, format_sensitivity


def quantize_each_alone(
    model: Model, fmt: str, fisher: dict[str, dict[str, float]], gauss_newton: dict[str, dict[str, float]], x0, t, noise
) -> Increases:
    """The increase of the loss of digits x0 at timesteps t for each weight of layers 1 to 6, and for all together.

    fisher, gauss_newton: {which timesteps: {name: value}}, what may predict it.
    """
    network, schedule = model.network().to(x0.device), schedule_of(model.config, x0.device)
    before = digit_losses(network, schedule, x0, t, noise)
    parameters, shapes = dict(network.named_parameters()), tensor_shapes(model.config)
    names = layer_weights(model.state)
    losses, squared_errors = {}, []
    for name in tqdm(names, desc=fmt, unit="tensor"):
        original = model.state[name]
        quantized = fake_quantize(original, stored_format(fmt, original.shape), shapes[name][1])
        with torch.no_grad():
            parameters[name].copy_(quantized)
            losses[name] = digit_losses(network, schedule, x0, t, noise) - before
            parameters[name].copy_(original)
        squared_errors.append(float((quantized - original).double().square().sum()))
    with torch.no_grad():
        for name, tensor in model.quantize(names, fmt, {}).state.items():
            parameters[name].copy_(tensor)
    together = mean_and_error(digit_losses(network, schedule, x0, t, noise) - before)
    layers = {}
    for layer in layers_in_order(names):
        layers[layer] = mean_and_error(sum(losses[name] for name in names if layer_of(name) == layer))
    means, errors = zip(*(mean_and_error(losses[name]) for name in names), strict=True)
    in_order = [{which: [v[n] for n in names] for which, v in kind.items()} for kind in (fisher, gauss_newton)]
    return Increases(fmt, names, list(means), squared_errors, in_order[0], layers, list(errors), in_order[1], together)


def main():
    parser = script_parser(__doc__, samples=False)
    parser.add_argument("--formats", choices=FORMATS[1:], nargs="+", default=["int8", "int4", "int2"])
    parser.add_argument("--digits", type=positive_int, default=200, help="held-out images whose loss is measured")
    options = parser.parse_args()

    from common.runtime import distributed
    from common.study.baselines import load_baseline
    from common.study.diffusion_fisher import fisher_table, gauss_newton_table
    from common.study.run import start

    if options.digits < 2:
        parser.error("argument --digits: 1 is too few for a standard error; give at least 2")
    run = start(options)
    there = len(run.load_images("test"))
    if options.digits > there:
        raise UserError(f"--digits {options.digits}: there are {there} held out in {run.data}; give at most as many")
    model = load_baseline(run)
    tables = fisher_table(run, model), gauss_newton_table(run, model)
    held = held_out(run, model, options.digits)
    samples = held.x0, held.t, held.noise
    fisher, gauss_newton = (
        {
            which: dict(zip(table.names, table.estimates(weighting)[0].tolist(), strict=True))
            for which, weighting in (("timestep 1", "first"), (EVEN, "uniform"), ("by weight in the image", "image"))
        }
        for table in tables
    )
    header = {
        "preset": run.preset_name,
        "baseline": model.sha256,
        "data": run.data,
        "digits": options.digits,
        "seed": run.sampling.seed,
    }
    formats = dict.fromkeys(options.formats)  # each once
    lines = [header, *(asdict(quantize_each_alone(model, fmt, fisher, gauss_newton, *samples)) for fmt in formats)]
    path = run.out / FILE
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    distributed.on_first(lambda: write_atomically(path, content))
    print(format_sensitivity(path))
    print(f"\nkept in {path}")
