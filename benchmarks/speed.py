"""Times this project's path and the published way, in turn, on the same network and the same work.

    python -m benchmarks.speed --preset quick
    python -m benchmarks.speed --preset paper --json speed.json

The published way (benchmarks/published.py) runs in a process of its own, and its FID by pytorch-fid's command over two
folders of PNG files (its Inception network has random weights here: the work is the same, and no FID is printed).
Times are medians of several rounds after one that does not count; the slow FID is timed once. "of peak" is the
arithmetic rate of the network as a share of the fastest kernel's of the same precision (benchmarks/peak.py); of mixed,
whose layers are of two precisions, as a share of that of 8 bits. bfloat16 is left out where the processor emulates it,
OpenVINO where it is not installed. Weights are random, and so is what activations of 8 bits are calibrated on.
"""

import contextlib
import io
import json
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import published
from benchmarks.graphs import graphs_of
from benchmarks.peak import higher, peaks
from benchmarks.published import fisher_samples, now, timed
from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import Denoiser, sample
from common.ddpm.schedule import Schedule, denoising_loss
from common.ddpm.unet import UNet
from common.engines.engine import is_integer
from common.engines.openvino import denoiser, is_installed
from common.errors import run_main
from common.fisher.information import fisher_information
from common.options import Parser, file_name, positive_int
from common.presets import PRESETS, Preset, UNetConfig
from common.runtime.device import autocast, bf16_is_faster, cast_weights, choose_device, device_name, set_up_torch
from common.runtime.files import write_atomically
from common.runtime.replay import WARM_UP
from common.study.run import require_writable_file
from common.training.loop import train

FID_IMAGES = 100  # in each folder
FID_WORK = f"FID of {FID_IMAGES} images"
SAMPLING_STEPS = 2
SAMPLING = "sampling, image and step"


@dataclass(frozen=True)
class Timing:
    """Seconds for one unit of work; `of_peak`: share of the machine's arithmetic rate."""

    work: str
    way: str
    seconds: float
    of_peak: float | None


def speed(preset: Preset, device: torch.device, rounds: int) -> list[Timing]:
    """Times sampling, training and Fisher information, each in the published way and in this project's."""
    torch.manual_seed(0)
    ours = UNet(preset.network).to(device, memory_format=torch.channels_last).eval()
    flops = forward_flops(ours, device)
    batch = 250 if device.type == "cuda" else 50
    digits = 16 if device.type == "cpu" else 256
    apart = spawned_process()

    def as_published(work: Callable[[UNetConfig, torch.device], float]) -> Callable[[], float]:
        return lambda: apart.submit(work, preset.network, device).result()

    ways: dict[tuple[str, str], tuple[Callable[[], float], float, str]] = {
        # (work, way): (seconds for one unit of work, arithmetic operations of one, precision)
        (SAMPLING, "published"): (as_published(published.sampling), flops, "fp32"),
        (SAMPLING, "fp32"): (lambda: sampling(ours, device, batch, "fp32"), flops, "fp32"),
        (SAMPLING, "bf16"): (lambda: sampling(ours, device, batch, "bf16"), flops, "bf16"),
        ("training, digit", "published"): (as_published(published.training), 3 * flops, "fp32"),
        ("training, digit", "fp32"): (lambda: training(preset, device, "fp32"), 3 * flops, "fp32"),
        ("training, digit", "bf16"): (lambda: training(preset, device, "bf16"), 3 * flops, "bf16"),
        ("Fisher, digit", "published"): (as_published(published.fisher), 3 * flops, "fp32"),
        ("Fisher, digit", "fp32"): (lambda: fisher(ours, device, digits), 3 * flops, "fp32"),
    }
    by_openvino = device.type == "cpu" and is_installed()
    if by_openvino:
        for precision, seconds in openvino_ways(ours, batch).items():
            ways[SAMPLING, f"openvino {precision}"] = seconds, flops, "int8" if is_integer(precision) else precision
    if not bf16_is_faster(device):
        ways = {key: way for key, way in ways.items() if way[2] != "bf16"}
    precisions, fastest = list(dict.fromkeys(used for _, _, used in ways.values())), {}
    times = {key: [] for key in ways}
    for round_ in tqdm(range(rounds + 1), desc="speed", unit="round"):
        fastest = higher(fastest, peaks(device, precisions, by_openvino))
        for key, (work, _, _) in ways.items():
            seconds = work()
            if round_ > 0:
                times[key].append(seconds)
    apart.shutdown()
    result = [Timing(f"10^9 operations: {peak.kernel}", p, 1e9 / peak.rate, 1.0) for p, peak in fastest.items()]
    for (work, way), (_, operations, used) in ways.items():
        seconds = statistics.median(times[work, way])
        result.append(Timing(work, way, seconds, operations / seconds / fastest[used].rate))
    return result + fid_apart(device)


def fid_apart(device: torch.device) -> list[Timing]:
    """`fid_timings` in a process of its own: pytorch-fid's command forks, and a fork of one that has run OpenVINO
    dies."""
    with spawned_process() as fresh:
        return fresh.submit(fid_timings, device).result()


def spawned_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def forward_flops(network: UNet, device: torch.device) -> float:
    """Floating-point operations of one image's pass through the network, a multiplication and an addition each."""
    # On a CPU the fused attention is not counted.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(1, 1, 32, 32, device=device), torch.zeros(1, dtype=torch.long, device=device))
    return counter.get_total_flops()


def openvino_ways(network: UNet, batch: int) -> dict[str, Callable[[], float]]:
    """{precision: seconds for an image and step} of sampling by OpenVINO."""
    return {
        precision: partial(step_time, denoiser(graph, precision), network.config.timesteps, torch.device("cpu"), batch)
        for precision, graph in graphs_of(network, batch).items()
    }


def step_time(denoise: Denoiser, timesteps: int, device: torch.device, batch: int) -> float:
    """Seconds for an image and step."""
    noise, schedule = NoiseStreams(0, range(batch)), Schedule(timesteps)
    seconds = timed(device, lambda: sample(denoise, schedule, noise, "ddim", SAMPLING_STEPS, 1.0, device))
    return seconds / batch / SAMPLING_STEPS


def sampling(network: UNet, device: torch.device, batch: int, precision: str) -> float:
    """The sampler as the scripts call it."""
    network = deepcopy(network)
    cast_weights(network, precision)
    with autocast(device, precision):
        return step_time(network, network.config.timesteps, device, batch)


def training(preset: Preset, device: torch.device, precision: str) -> float:
    """The training loop itself, two steps of it: on a GPU once they are replayed, and without the last step, which
    writes the state."""
    times, first = [], WARM_UP if device.type == "cuda" else 0
    digits = torch.randint(0, 256, (4 * preset.training.batch_size, 32, 32), dtype=torch.uint8)
    with TemporaryDirectory() as folder:
        config, state = replace(preset.training, steps=first + 4), Path(folder) / "state.safetensors"
        train(UNet(preset.network), config, digits, state, device, precision, lambda *_: times.append(now(device)))
    return (times[first + 2] - times[first]) / 2 / preset.training.batch_size


def fisher(network: UNet, device: torch.device, digits: int) -> float:
    """Squared gradients of each digit as the scripts measure them."""
    samples = fisher_samples(device, digits)

    def loss(call, x0, t, noise):
        return denoising_loss(call, Schedule(), x0, t, noise)

    return timed(device, lambda: fisher_information(network, loss, samples)) / digits


def fid_timings(device: torch.device) -> list[Timing]:
    """Seconds for the FID of FID_IMAGES images against as many digits: pytorch-fid's command, and here, where the
    digits' statistics are kept from run to run. Untrained Inception weights stand for the real ones in both."""
    from PIL import Image
    from pytorch_fid import fid_score, inception

    from common.metrics.features import Inception, load_features
    from common.metrics.scores import extract, fid, make_reference

    set_up_torch()
    images = torch.randint(0, 256, (2 * FID_IMAGES, 32, 32), dtype=torch.uint8)
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(nn.Module, "load_state_dict"),
        contextlib.redirect_stderr(io.StringIO()),  # its progress bars
    ):
        halves = [Path(folder) / half for half in ("generated", "real")]
        for half in halves:
            half.mkdir()
        for i, image in enumerate(images.numpy()):
            Image.fromarray(image).save(halves[i % 2] / f"{i}.png")
        paths = [str(half) for half in halves]
        by_command = timed(
            device, lambda: fid_score.calculate_fid_given_paths(paths, 50, device, Inception.dimensions, num_workers=2)
        )
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[Inception.dimensions]])
    inception_network = Inception(network.eval(), torch.zeros(1008, Inception.dimensions)).to(device)
    timings = [Timing(FID_WORK, "published", by_command, None)]
    for network in (inception_network, load_features("mnist", device, None)):
        reference = make_reference(extract(images, network)[0])
        seconds = timed(device, lambda: fid(extract(images[::2], network)[0], reference))  # noqa: B023, runs at once
        timings.append(Timing(FID_WORK, network.name, seconds, None))
    return timings


def format_timings(timings: list[Timing]) -> str:
    """A table; each way's speed is that of the published way over it."""
    by_published = {t.work: t.seconds for t in timings if t.way == "published"}
    lines = [f"{'work':40}{'way':>15}{'ms':>11}{'faster':>9}{'of peak':>9}"]
    for t in timings:
        peak = "-" if t.of_peak is None else f"{t.of_peak:.1%}"
        ratio = f"{by_published[t.work] / t.seconds:.2f}x" if t.work in by_published else "-"
        lines.append(f"{t.work:40}{t.way:>15}{1000 * t.seconds:>11.3f}{ratio:>9}{peak:>9}")
    return "\n".join(lines)


def main():
    parser = Parser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where available, else cpu")
    parser.add_argument("--rounds", type=positive_int, default=5, help="that count")
    parser.add_argument("--json", type=file_name, metavar="FILE", help="write the times there too")
    options = parser.parse_args()
    if options.json:
        require_writable_file("--json", options.json)
    set_up_torch()
    device = choose_device(options.device)
    timings = speed(PRESETS[options.preset], device, options.rounds)
    name = device_name(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    print(f"preset {options.preset}; {name}; torch {torch.__version__}; {options.rounds} rounds")
    print(format_timings(timings))
    if options.json:
        setting = {"preset": options.preset, "device": name, "torch": torch.__version__, "rounds": options.rounds}
        write_atomically(options.json, json.dumps(setting | {"timings": [asdict(t) for t in timings]}).encode())


if __name__ == "__main__":
    run_main(main)
