"""Other packages' quantization of the same network, digits, noise and metric; a line says what one cannot do.

    pip install torchao optimum-quanto nvidia-modelopt
    python -m benchmarks.peers --preset quick

Weights alone are quantized, of the layers that a package supports. "file MiB" is what the package's own state takes on
disk. The rows join results.jsonl. A package that is not installed has a line too.
"""

import io
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from common.errors import UserError, run_main
from common.options import script_parser


def quanto(bits: str) -> Callable:
    """optimum-quanto: linear layers and convolutions; transposed ones stay FP32."""

    def quantized(network, samples):
        from optimum.quanto import freeze, qint4, qint8, quantize

        quantize(network, weights={"int8": qint8, "int4": qint4}[bits])
        freeze(network)
        return network, network.state_dict()

    return quantized


def torchao(bits: str) -> Callable:
    """torchao: linear layers alone."""

    def quantized(network, samples):
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        quantize_(network, {"int8": Int8WeightOnlyConfig, "int4": Int4WeightOnlyConfig}[bits]())
        return network, network.state_dict()

    return quantized


def modelopt(effective_bits: float) -> Callable:
    """nvidia-modelopt: a format for each layer, chosen by the gradient of the loss."""

    def quantized(network, samples):
        import modelopt.torch.opt as mto
        import modelopt.torch.quantization as mtq

        x, t, noise = samples
        network, _ = mtq.auto_quantize(
            network,
            constraints={"effective_bits": effective_bits},
            quantization_formats=[mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.INT8_WEIGHT_ONLY_CFG],
            data_loader=[(x[i : i + 16], t[i : i + 16], noise[i : i + 16]) for i in range(0, len(x), 16)],
            forward_step=lambda network, batch: network(batch[0], batch[1]),
            loss_func=lambda output, batch: (output - batch[2]).square().mean(),
            num_calib_steps=len(x) // 16,
            num_score_steps=len(x) // 16,
        )
        return network, {"modelopt": mto.modelopt_state(network), "weights": network.state_dict()}

    return quantized


PEERS = {  # name: (package, what quantizes)
    "quanto int8": ("optimum-quanto", quanto("int8")),
    "quanto int4": ("optimum-quanto", quanto("int4")),
    "torchao int8": ("torchao", torchao("int8")),
    "torchao int4": ("torchao", torchao("int4")),
    "modelopt auto_quantize, 4.8 bits": ("nvidia-modelopt", modelopt(4.8)),
}


def is_as_it_was(state: dict, original: dict) -> bool:
    """Whether all tensors are plain ones of the same values."""
    if state.keys() != original.keys():
        return False
    same_type = all(type(tensor) is type(original[name]) for name, tensor in state.items())
    return same_type and all(tensor.cpu().equal(original[name]) for name, tensor in state.items())


def as_it_is(network):
    """The network, neither moved nor in inference mode: not every package's tensors bear that."""
    import torch

    class AsItIs(torch.nn.Module):
        config = network.config

        def forward(self, x, t):
            with torch.inference_mode(False), torch.no_grad():
                return network(x.clone(), t.clone())

    return AsItIs()


def main():
    parser = script_parser(__doc__)
    options = parser.parse_args()
    if options.engine != "torch":
        parser.error("argument --engine: the packages' networks are sampled by torch alone; leave it out")

    import torch

    from common.ddpm.digits import load_digits
    from common.ddpm.schedule import Schedule
    from common.formats.packed import MIB
    from common.runtime import distributed
    from common.study.baselines import load_baseline
    from common.study.diffusion_fisher import noised
    from common.study.evaluate import baseline_row, make_evaluator, measured_row, settings_of
    from common.study.report import format_table
    from common.study.run import start

    run = start(options)
    missing = [package for package in dict.fromkeys(package for package, _ in PEERS.values()) if not _version(package)]
    if len(missing) == len({package for package, _ in PEERS.values()}):
        raise UserError(f"none of the packages is installed: pip install {' '.join(missing)}")
    baseline, evaluator = load_baseline(run), make_evaluator(run)
    original, settings = evaluator.measure(baseline), settings_of(run, evaluator, baseline.sha256)
    timesteps = torch.linspace(0, run.preset.network.timesteps - 1, 128).long().tolist()
    x0, t, noise = noised(run, load_digits(run.data, "train", run.data_dir), timesteps)
    samples = Schedule(run.preset.network.timesteps).add_noise(x0, t, noise), t, noise
    rows, failures = [baseline_row(settings, baseline, original, run.checkpoint)], []
    for name, (package, quantize) in PEERS.items():
        try:
            if not _version(package):
                failures.append(f"{name}: is not installed: pip install {package}")
                continue
            weights = f"{baseline.sha256} {name}, {package} {_version(package)}"
            network, state = quantize(baseline.network().to(run.device), samples)
            if is_as_it_was(network.state_dict(), baseline.state):
                failures.append(f"{name}: leaves the network as it was")
                continue
            measured = evaluator.measure_network(as_it_is(network.eval()), weights, name)
        except Exception as error:  # whatever a package that cannot do it raises
            reason = (str(error) or type(error).__name__).splitlines()[0]
            failures.append(f"{name}: cannot: {type(error).__name__}: {reason[:120]}")
            continue
        file = io.BytesIO()
        torch.save(state, file)
        mib = len(file.getvalue()) / MIB
        about = {"strategy": "Peer", "setting": name, "format": package, "size_mib": mib, "file_mib": mib}
        rows.append(measured_row(settings, name, measured, original, **about))
    if distributed.rank() == 0:
        run.results.add(rows)
    print("\n".join([format_table(rows), "", *failures]))


def _version(package: str) -> str | None:
    """The installed version, if any."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_main(main)
