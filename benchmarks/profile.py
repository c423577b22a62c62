"""Where the time goes: the operators that take the most of sampling, training and Fisher information.

    python -m benchmarks.profile --preset paper

Each work runs twice, as benchmarks.speed times it, and once more under PyTorch's profiler. Shares are of the time spent
in the operators themselves; those of less than 2% are summed up.
"""

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.speed import fisher, sampling, training
from common.ddpm.unet import UNet
from common.errors import run_main
from common.options import Parser
from common.presets import PRESETS
from common.runtime.device import bf16_is_faster, choose_device, set_up_torch

LEAST = 0.02


def operator_shares(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """{operator: share of the time}, the largest first."""
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        work()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key.removeprefix("aten::"): getattr(event, key) for event in profiler.key_averages()}
    return {name: times[name] / sum(times.values()) for name in sorted(times, key=times.get, reverse=True)}


def main():
    parser = Parser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where available, else cpu")
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, such as that there is no GPU
    set_up_torch()
    device, preset = choose_device(options.device), PRESETS[options.preset]
    network = UNet(preset.network).to(device, memory_format=torch.channels_last).eval()
    batch, digits = (250, 256) if device.type == "cuda" else (50, 16)
    precisions = ["fp32", "bf16"] if bf16_is_faster(device) else ["fp32"]
    works: dict[str, Callable[[], float]] = {}
    for precision in precisions:
        works[f"sampling, {precision}"] = lambda precision=precision: sampling(network, device, batch, precision)
        works[f"training, {precision}"] = lambda precision=precision: training(preset, device, precision)
    works["Fisher, fp32"] = lambda: fisher(network, device, digits)
    for label, work in tqdm(works.items(), unit="work"):
        work()
        work()
        shares = operator_shares(work, device)
        shown = {name: share for name, share in shares.items() if share >= LEAST}
        parts = [f"{name} {share:.0%}" for name, share in shown.items()]
        tqdm.write(f"{label}: {', '.join(parts)}, others {1 - sum(shown.values()):.0%}")


if __name__ == "__main__":
    run_main(main)
