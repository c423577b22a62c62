"""A run: the scripts' options with every default filled in and checked, and what it will cost."""

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.choose.layers import layer_weights
from common.ddpm.sampling import Sampling
from common.ddpm.unet import UNet
from common.errors import UserError
from common.formats.packed import MIB, Model, load_model, size_mib, tensor_shapes
from common.presets import PRESETS, Preset, TrainingConfig
from common.runtime import distributed
from common.runtime.device import autocast, bf16_is_faster, choose_device, device_name, set_up_torch
from common.study import report

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


def preset_checkpoint(preset_name: str) -> Path:
    """Where a preset's baseline is kept."""
    return CHECKPOINTS / f"{preset_name}.safetensors"


@dataclass(frozen=True)
class Run:
    """Options with every default filled in, checked."""

    preset_name: str
    preset: Preset
    training: TrainingConfig
    checkpoint: Path
    data: str
    data_dir: Path
    fmt: str
    fisher_timestep: int | str
    device: torch.device
    sampling: Sampling
    metric: str
    inception_weights: Path | None
    out: Path
    dry_run: bool


def settle(options: argparse.Namespace) -> Run:
    """Fills defaults, checks everything that can be checked before any work, and prints what will be used and why.

    Raises UserError naming the option, its value and the remedy.
    """
    set_up_torch()
    device = distributed.start(choose_device(options.device))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    name, why = options.preset, "--preset"
    if name is None and options.checkpoint is not None and options.checkpoint.exists():
        name, why = read_checkpoint(options.checkpoint).metadata.get("preset"), "the checkpoint's"
        if name not in PRESETS:
            raise UserError(f"--checkpoint {options.checkpoint}: made with preset {name}, unknown here; give --preset")
    if name is None:
        name, why = ("paper", "CUDA is available") if torch.cuda.is_available() else ("quick", "no CUDA device here")
    preset = PRESETS[name]
    few = "dpm++" if options.steps and preset.sampler == "ddpm" else preset.sampler
    implied = few if options.eta is None else "ddim"
    sampler = options.sampler or implied
    timesteps = preset.network.timesteps
    default_steps = timesteps if sampler == "ddpm" else preset.steps
    steps = options.steps or default_steps
    if sampler == "ddpm" and steps != timesteps:
        raise UserError(f"--steps {steps}: --sampler ddpm takes all {timesteps} steps; use --sampler dpm++ for fewer")
    if steps > timesteps:
        raise UserError(f"--steps {steps}: there are {timesteps} timesteps; give at most as many")
    if sampler != "ddim" and options.eta is not None:
        raise UserError(f"--eta {options.eta:g}: goes with --sampler ddim only")
    if options.inception_weights is not None and options.metric != "inception":
        raise UserError(f"--inception-weights {options.inception_weights}: goes with --metric inception only")
    if not 0 <= options.seed < 2**64:
        raise UserError(f"--seed {options.seed}: must lie in 0..2^64 - 1")
    sampling = Sampling(
        images=options.images or preset.images,
        sampler=sampler,
        steps=steps,
        eta=1.0 if sampler != "ddim" else preset.eta if options.eta is None else options.eta,
        batch_size=options.batch_size or (250 if device.type == "cuda" else 50),
        seed=options.seed,
        device=distributed.broadcast(device_name(device)),
        precision=options.precision,
    )
    run = Run(
        preset_name=name,
        preset=preset,
        training=replace(preset.training, data=options.data or preset.training.data),
        checkpoint=options.checkpoint or preset_checkpoint(name),
        data=options.data or preset.training.data,
        data_dir=options.data_dir,
        fmt=options.format,
        fisher_timestep=int(options.fisher_timestep) if options.fisher_timestep == "1" else options.fisher_timestep,
        device=device,
        sampling=sampling,
        metric=options.metric,
        inception_weights=options.inception_weights,
        out=options.out or Path("results") / name,
        dry_run=options.dry_run,
    )
    threads, processes = torch.get_num_threads(), distributed.processes()
    workers = f"{threads} threads" if processes == 1 else f"{processes} processes of {threads} threads"
    print(f"preset {name} ({why}); {device.type}, {workers}, torch {torch.__version__}")
    if options.samples:
        print(
            f"{sampling.images} images, {sampling.method}, batch {sampling.batch_size}, {sampling.precision}, "
            f"seed {sampling.seed}; data {run.data}; format {run.fmt}; Fisher timestep {run.fisher_timestep}; "
            f"{run.out}/"
        )
    if not run.dry_run:
        report.read_rows(run.out / "results.jsonl", absent_is_empty=True)
        require_writable("--out", run.out, needed_mib=32 * size_mib(preset.network, {}))
    return run


def require_writable(option: str, folder: Path, needed_mib: float) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written ({error.strerror}); name another folder") from None
    if free / MIB < needed_mib:
        raise UserError(f"{option} {folder}: {free / MIB:.0f} MiB free, {needed_mib:.0f} needed; name another folder")


def print_sizes(run: Run) -> None:
    """What --dry-run shows: parameters, sizes and cost."""
    config = run.preset.network
    shapes = tensor_shapes(config)
    names = layer_weights(shapes)
    parameters = sum(shape.numel() for shape, _ in shapes.values())
    baseline = size_mib(config, {})
    print(f"{parameters:,} parameters in {len(shapes)} tensors; the strategies choose among {len(names)} weights")
    print(f"baseline FP32 {baseline:.2f} MiB")
    for fmt in dict.fromkeys(("fp16", run.fmt)):
        size = size_mib(config, dict.fromkeys(names, fmt))
        print(f"uniform {fmt.upper()} {size:.2f} MiB ({1 - size / baseline:.2%} smaller)")
    print(cost_estimate(run))


def cost_estimate(run: Run) -> str:
    """Times one small batch, forward and backward, and says what sampling and training take at that rate."""
    network = UNet(run.preset.network).to(run.device, memory_format=torch.channels_last)
    batch = run.training.batch_size if run.device.type == "cuda" else 8
    x, t = torch.randn(batch, 1, 32, 32, device=run.device), torch.zeros(batch, dtype=torch.long, device=run.device)

    def seconds(work) -> float:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            work()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times) / batch / distributed.processes()

    def forward():
        with torch.inference_mode(), autocast(run.device, run.sampling.precision):
            network(x, t)

    def train_step():
        with autocast(run.device, training_precision(run.device)):
            loss = network(x, t).square().mean()
        loss.backward()

    sampling_seconds = seconds(forward) * run.sampling.images * run.sampling.steps
    training_seconds = seconds(train_step) * run.training.batch_size * run.training.steps
    text = (
        f"cost on this device, roughly: {duration(sampling_seconds)} for the images of one row, "
        f"{duration(training_seconds)} to train the baseline"
    )
    if run.preset_name == "paper" and training_seconds > 3 * 3600:
        text += "; --preset quick ships trained"
    return text


def duration(seconds: float) -> str:
    """A time that a person reads: 42 s, 7 min, 41 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def training_precision(device: torch.device) -> str:
    return "bf16" if bf16_is_faster(device) else "fp32"


def read_checkpoint(path: Path) -> Model:
    """The model of a file that is there. Raises UserError naming --checkpoint."""
    try:
        return load_model(path)
    except OSError as error:
        raise UserError(f"--checkpoint {path}: cannot be read ({error.strerror})") from None
