"""Other packages' quantization of the same network, digits, noise and metric; a line says what one cannot do.

    pip install torchao optimum-quanto nvidia-modelopt sdnq nncodec
    python -m benchmarks.peers --preset quick

Weights alone are quantized, of the layers that a package supports. The size is what the package's own state takes on
disk. nncodec, which needs a C++ compiler, fits files of a size: with one step for all weights, and with steps by Fisher
information, as layer_budget.py has them. The rows join results.jsonl. A package that is not installed has a line too.
"""

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory

from common.errors import UserError, run_main
from common.options import script_parser

# quantize(network, samples, values) -> (what is sampled, what is stored: tensors by name, or bytes); samples: (x, t,
# noise) as the network meets them; values: {tensor: Fisher value}.


def quanto(bits: str) -> Callable:
    """optimum-quanto: linear layers and convolutions; transposed ones stay FP32."""

    def quantized(network, samples, values):
        from optimum.quanto import freeze, qint4, qint8, quantize

        quantize(network, weights={"int8": qint8, "int4": qint4}[bits])
        freeze(network)
        return network, network.state_dict()

    return quantized


def torchao(bits: str) -> Callable:
    """torchao: linear layers alone."""

    def quantized(network, samples, values):
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        quantize_(network, {"int8": Int8WeightOnlyConfig, "int4": Int4WeightOnlyConfig}[bits]())
        return network, network.state_dict()

    return quantized


def modelopt(effective_bits: float) -> Callable:
    """nvidia-modelopt: a format for each layer, chosen by the gradient of the loss."""

    def quantized(network, samples, values):
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


def sdnq(weights_dtype: str) -> Callable:
    """sdnq: linear layers and convolutions, in groups; its own choice of which are too small."""

    def quantized(network, samples, values):
        from sdnq import sdnq_post_load_quant

        network = sdnq_post_load_quant(network, weights_dtype=weights_dtype, quant_conv=True)
        return network, network.state_dict()

    return quantized


def nncodec(times: float, by_fisher: bool) -> Callable:
    """nncodec: all tensors, by the coder of ISO/IEC 15938-17 with its trellis, in a file `times` smaller than FP32's.

    It has four steps to the octave. So one step for all weights means one of two neighbours, the finer in as many of
    them as fit; vectors have nncodec's own fine step. By Fisher values, steps are proportional to 1 / sqrt(value).
    """

    def quantized(network, samples, values):
        import torch
        from nncodec import nn

        state = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
        weights = [name for name, tensor in state.items() if tensor.ndim > 1]
        mean = sum(values.values()) / len(values)
        steps = {name: math.sqrt(mean / value) for name, value in values.items()}

        def coded(fineness: float) -> bytes:
            if by_fisher:
                chosen = {name: _nncodec_qp(step * 2 ** (-fineness / 4)) for name, step in steps.items()}
            else:
                chosen = {name: -math.floor(fineness + i / len(weights)) for i, name in enumerate(weights)}
            with TemporaryDirectory() as folder:
                return bytes(nn.encode(state, {"qp_per_tensor": chosen, "results": folder, "verbose": False}))

        limit, low, high = sum(tensor.nbytes for tensor in state.values()) / times, -40.0, 80.0
        for _ in range(14):  # to a hundredth of a step
            middle = (low + high) / 2
            low, high = (middle, high) if len(coded(middle)) <= limit else (low, middle)
        file = coded(low)
        if len(file) > limit:
            raise ValueError(f"no file {times:g} times smaller")
        own = network.state_dict()
        decoded = nn.decode(bytearray(file))  # it takes nothing else
        network.load_state_dict({name: torch.as_tensor(decoded[name]).reshape(own[name].shape) for name in own})
        return network, file

    return quantized


def _nncodec_qp(step: float) -> int:
    """nncodec's number of the nearest step below: 2**floor(qp / 4) * (1 + (qp % 4) / 4)."""
    octave = math.floor(math.log2(step))
    return 4 * octave + math.floor(4 * (step / 2**octave - 1))


PEERS = {  # name: (package, what quantizes)
    "quanto int8": ("optimum-quanto", quanto("int8")),
    "quanto int4": ("optimum-quanto", quanto("int4")),
    "torchao int8": ("torchao", torchao("int8")),
    "torchao int4": ("torchao", torchao("int4")),
    "modelopt auto_quantize, 4.8 bits": ("nvidia-modelopt", modelopt(4.8)),
    "sdnq int8": ("sdnq", sdnq("int8")),
    "sdnq int4": ("sdnq", sdnq("int4")),
} | {
    f"nncodec {times}x{', steps by Fisher' * by_fisher}": ("nncodec", nncodec(times, by_fisher))
    for times in (10, 13, 16)
    for by_fisher in (False, True)
}


def is_as_it_was(state: dict, original: dict) -> bool:
    """Whether all tensors are plain ones of the same values."""
    if state.keys() != original.keys():
        return False
    same_type = all(type(tensor) is type(original[name]) for name, tensor in state.items())
    return same_type and all(tensor.cpu().equal(original[name]) for name, tensor in state.items())


def stored(state: dict | bytes) -> bytes:
    """The file of what a package stores."""
    if isinstance(state, bytes):
        return state
    import torch

    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def as_it_is(network):
    """The network, neither moved nor in inference mode: not every package's tensors bear that."""
    import torch

    class AsItIs(torch.nn.Module):
        architecture = network.architecture

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

    from common.ddpm.architecture import schedule_of
    from common.formats.packed import MIB
    from common.runtime import distributed
    from common.study.baselines import load_baseline
    from common.study.budget_models import tensor_values
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
    x0, t, noise = noised(run, run.load_images("train"), timesteps)
    samples = schedule_of(run.preset.network).add_noise(x0, t, noise), t, noise
    values = tensor_values(replace(run, timestep_weighting="image"), baseline) if _version("nncodec") else {}
    rows, failures = [baseline_row(settings, baseline, original, run.checkpoint)], []
    if distributed.rank() == 0:
        run.results.add(rows)
    for name, (package, quantize) in PEERS.items():
        try:
            if not _version(package):
                failures.append(f"{name}: is not installed: pip install {package}")
                continue
            network, state = quantize(baseline.network().to(run.device), samples, values)
            if is_as_it_was(network.state_dict(), baseline.state):
                failures.append(f"{name}: leaves the network as it was")
                continue
            sampled, file = as_it_is(network.eval()), stored(state)
            sampled(*(part[:2] for part in samples[:2]))
        except UserError:
            raise
        except Exception as error:  # whatever a package that cannot do it raises
            reason = (str(error) or type(error).__name__).splitlines()[0]
            failures.append(f"{name}: cannot: {type(error).__name__}: {reason[:120]}")
            continue
        made = hashlib.sha256(file).hexdigest()  # the images are kept by what made them
        weights = f"{baseline.sha256} {name}, {package} {_version(package)}, {made}"
        measured, mib = evaluator.measure_network(sampled, weights, name), len(file) / MIB
        about = {"strategy": "Peer", "setting": name, "format": package, "size_mib": mib, "file_mib": mib}
        rows.append(measured_row(settings, name, measured, original, **about))
        if distributed.rank() == 0:
            run.results.add(rows[-1:])
    print("\n".join([format_table(rows), "", *failures]))


def _version(package: str) -> str | None:
    """The installed version, if any."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_main(main)
