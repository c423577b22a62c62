"""Other packages' quantization of the same network, digits, noise and metric; what one cannot do is a row that says so.

    pip install torchao optimum-quanto nvidia-modelopt
    python -m benchmarks.peers --preset quick

Weights alone are quantized, of the layers that a package supports. "file MiB" is what the package's own state takes on
disk. A package that is not installed has a row too.
"""

import io
from collections.abc import Callable

from common.config import run_main, script_parser


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


PEERS = {
    "optimum-quanto int8": quanto("int8"),
    "optimum-quanto int4": quanto("int4"),
    "torchao int8 weight-only": torchao("int8"),
    "torchao int4 weight-only": torchao("int4"),
    "modelopt auto_quantize, 4.8 bits": modelopt(4.8),
}


def main():
    parser = script_parser(__doc__, quantizes=False)
    options = parser.parse_args()

    import torch

    from common.baseline import load_baseline
    from common.data import load_digits
    from common.diffusion import Schedule
    from common.diffusion_fisher import noised
    from common.experiment import make_bench, measure
    from common.metrics import psnr, score
    from common.model import MIB
    from common.run import print_sizes, settle
    from common.sampling import generate

    run = settle(options)
    if run.dry_run:
        print_sizes(run)
        return
    baseline, bench = load_baseline(run), make_bench(run)
    original = measure(run, bench, baseline)
    timesteps = torch.linspace(0, run.preset.network.timesteps - 1, 128).long().tolist()
    x0, t, noise = noised(run, load_digits(run.data, "train", run.data_dir), timesteps)
    samples = Schedule(run.preset.network.timesteps).add_noise(x0, t, noise), t, noise
    print(f"\n{'':36}{'FID':>18}{'FID - FP32':>22}{'PSNR dB':>14}{'file MiB':>10}")
    for name, quantize in PEERS.items():
        try:
            network, state = quantize(baseline.network().to(run.device), samples)
            network.to = lambda *_, network=network, **__: network  # not every package's tensors can be moved
            images = generate(network.eval(), f"{baseline.sha256} {name}", run.sampling, run.out / "images", name)
        except Exception as error:  # whatever a package that is absent or cannot do it raises
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"{name:36}  cannot: {type(error).__name__}: {reason[:120]}", flush=True)
            continue
        if images.equal(original.images):
            print(f"{name:36}  leaves every image as it was", flush=True)
            continue
        file = io.BytesIO()
        torch.save(state, file)
        scores = score(images, bench.network, bench.reference)
        difference, error = scores.fid.minus(original.scores.fid)
        decibels, decibels_error = psnr(images, original.images)
        cells = (
            f"{scores.fid.value:.3f} ± {scores.fid.error:.3f}",
            f"{difference:+.4f} ± {error:.4f}",
            f"{decibels:.1f} ± {decibels_error:.1f}",
        )
        print(f"{name:36}{cells[0]:>18}{cells[1]:>22}{cells[2]:>14}{len(file.getvalue()) / MIB:>10.3f}", flush=True)


if __name__ == "__main__":
    run_main(main)
