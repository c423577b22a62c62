"""Peak memory of sampling, Fisher information and metrics against the number of images, each in a process of its own.

    python -m benchmarks.memory --preset quick --images 1000 10000

What is kept of each image is part of it: 1 KiB of pixels, for the metrics 1 KiB of features too, and for Fisher
information 4 KiB of the digit and 4 KiB of its noise, as FP32.

Below stands what sampling holds by each engine and in each precision: the resident memory when a batch of 50 has been
sampled, beyond that of the same process before it had the network. OpenVINO reads a file of python -m common export.
"""

import gc
import resource
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import run_main
from common.options import Parser, positive_int
from common.presets import PRECISIONS, PRESETS

WORKS = ("sampling", "Fisher", "metrics")
BATCH = 50


def peak(work: str, preset_name: str, images: int) -> float:
    """MiB of this process at the most, after `work` on so many images; one step for each where they are sampled."""
    import torch

    from common.ddpm.unet import UNet
    from common.runtime.device import set_up_torch

    set_up_torch()
    network = UNet(PRESETS[preset_name].network).eval()
    if work == "sampling":
        from common.ddpm.sampling import Sampling, generate

        sampling = Sampling(images, "ddim", 1, 1.0, 50, 0, "cpu", "fp32")
        with TemporaryDirectory() as folder:
            generate(network, "", sampling, torch.device("cpu"), Path(folder), work)
    elif work == "Fisher":
        from benchmarks.speed import fisher

        fisher(network, torch.device("cpu"), images)
    else:
        from common.metrics.features import load_features
        from common.metrics.scores import make_reference, score

        features = load_features("mnist", torch.device("cpu"))
        digits = torch.randint(0, 256, (images, 32, 32), dtype=torch.uint8)
        score(digits, features, make_reference(torch.rand(1000, features.dimensions).numpy()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def held(engine: str, precision: str, preset_name: str, file: Path | None) -> float:
    """MiB that this process holds after a batch of 50 in two steps, beyond what it held before it had the network."""
    import torch

    from common.ddpm.noise import NoiseStreams
    from common.ddpm.samplers import sample
    from common.ddpm.sampling import Sampling, prepare_torch
    from common.ddpm.schedule import Schedule
    from common.ddpm.unet import UNet
    from common.engines.openvino import denoiser
    from common.runtime.device import set_up_torch

    set_up_torch()
    if engine == "openvino":
        import openvino

        core = openvino.Core()
    noise, schedule = NoiseStreams(0, range(BATCH)), Schedule(PRESETS[preset_name].network.timesteps)
    before = resident()
    if engine == "openvino":
        denoise = denoiser(core.read_model(file), precision)
    else:
        sampling = Sampling(BATCH, "ddim", 2, 1.0, BATCH, 0, "cpu", precision)
        denoise = prepare_torch(UNet(PRESETS[preset_name].network).eval(), sampling, torch.device("cpu"))
    sample(denoise, schedule, noise, "ddim", 2, 1.0)
    gc.collect()
    return resident() - before


def resident() -> float:
    """MiB of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def write_graphs(preset_name: str, folder: Path) -> None:
    """Files of the network with random weights for each precision."""
    from benchmarks.graphs import graphs_of
    from common.ddpm.unet import UNet
    from common.engines.export import save_openvino

    for precision, graph in graphs_of(UNet(PRESETS[preset_name].network).eval(), BATCH).items():
        (folder / precision).mkdir()
        save_openvino(folder / precision, graph)


def apart(work, *arguments):
    """What work(*arguments) returns in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def main():
    parser = Parser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--images", type=positive_int, nargs="+", default=[1_000, 10_000], metavar="N")
    options = parser.parse_args()
    print(f"preset {options.preset}; peak MiB of the process\n")
    print(f"{'images':12}" + "".join(f"{n:>10,}" for n in options.images))
    for work in WORKS:
        peaks = []
        for images in options.images:
            peaks.append(apart(peak, work, options.preset, images))
        print(f"{work:12}" + "".join(f"{mib:>10.0f}" for mib in peaks), flush=True)
    print(f"\n{f'held when sampling, batch {BATCH}':34}{'MiB':>8}")
    print_held(options.preset)


def print_held(preset_name: str) -> None:
    from common.engines.openvino import is_installed

    for precision in ("fp32", "bf16"):
        print(f"{f'torch {precision}':34}{apart(held, 'torch', precision, preset_name, None):>8.0f}", flush=True)
    if not is_installed():
        print("openvino or nncf is not installed: pip install -r requirements-openvino.txt")
        return
    with TemporaryDirectory() as folder:
        apart(write_graphs, preset_name, Path(folder))
        for precision in PRECISIONS:
            mib = apart(held, "openvino", precision, preset_name, Path(folder) / precision / "model.xml")
            print(f"{f'openvino {precision}':34}{mib:>8.0f}", flush=True)


if __name__ == "__main__":
    run_main(main)
