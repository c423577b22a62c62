"""Peak memory of sampling, Fisher information and metrics against the number of images, each in a process of its own.

    python -m benchmarks.memory --preset quick --images 1000 10000

What is kept of each image is part of it: 1 KiB of pixels, for the metrics 1 KiB of features too, and for Fisher
information 4 KiB of the digit and 4 KiB of its noise, as FP32.
"""

import resource
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import run_main
from common.options import Parser, positive_int
from common.presets import PRESETS

WORKS = ("sampling", "Fisher", "metrics")


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
            with get_context("spawn").Pool(1) as pool:
                peaks.append(pool.apply(peak, (work, options.preset, images)))
        print(f"{work:12}" + "".join(f"{mib:>10.0f}" for mib in peaks), flush=True)


if __name__ == "__main__":
    run_main(main)
