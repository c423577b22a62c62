"""A run: the scripts' options with every default filled in and checked, and what it will cost."""

import argparse
import errno
import math
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from common.choose.layers import layer_weights, layers_in_order
from common.ddpm.architecture import Architecture, build
from common.ddpm.digits import load_digits, typical_variance
from common.ddpm.folder import describe_folder, load_folder, split_names
from common.ddpm.pipelines import DiffusersConfig
from common.ddpm.sampling import Sampling
from common.engines.engine import INTEGER_PRECISIONS, engine_name
from common.errors import UserError
from common.formats.diffusers_folder import read_configs
from common.formats.packed import MIB, Model, load_model, size_mib, tensor_shapes, weights_of
from common.metrics.features import INCEPTION_DIMENSIONS, inception_file
from common.options import DIGITS, LARGEST_SEED
from common.presets import PRESETS, Preset, TrainingConfig, UNetConfig
from common.runtime import distributed
from common.runtime.device import autocast, bf16_is_faster, choose_device, device_name, set_up_torch
from common.study.rows import ResultStore

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


def preset_checkpoint(preset_name: str) -> Path:
    """Where a preset's baseline is kept."""
    return CHECKPOINTS / f"{preset_name}.safetensors"


@dataclass(frozen=True)
class Run:
    """Options with every default filled in, checked. why: what decided the preset; model: the folder of --model, if
    any; data: what the images are called, images: their folder, where they are not the digits of that name; sampling:
    of the first of `seeds` draws."""

    preset_name: str
    why: str
    preset: Preset
    training: TrainingConfig
    model: Path | None
    checkpoint: Path
    data: str
    images: Path | None
    data_dir: Path
    fmt: str
    timestep_weighting: str
    curvature: str
    device: torch.device
    sampling: Sampling
    seeds: int
    samples: bool
    metric: str
    inception_weights: Path | None
    out: Path
    dry_run: bool

    @property
    def results(self) -> ResultStore:
        return ResultStore(self.out / "results.jsonl")

    @property
    def is_own(self) -> bool:
        """Whether the network is this project's own, not one of diffusers."""
        return isinstance(self.preset.network, UNetConfig)

    @property
    def name(self) -> str:
        return f"preset {self.preset_name}" if self.is_own else f"model {self.preset_name}"

    def load_images(self, split: str) -> torch.Tensor:
        """Images of --data, uint8 (N, H, W), or (N, C, H, W) of more channels than one. split: "train" or "test".

        Raises UserError."""
        if self.images is None:
            return load_digits(self.data, split, self.data_dir)
        return load_folder(self.images, split, self.preset.network.image_shape)

    @cached_property
    def image_variance(self) -> float:
        """`typical_variance` of the images to train on."""
        return typical_variance(self.load_images("train"))


def resolve(options: argparse.Namespace) -> Run:
    """Fills defaults and checks all that options alone can say; changes nothing.

    Raises UserError naming the option, its value and the remedy.
    """
    device = choose_device(options.device)
    name, why, preset = choose_network(options.preset, options.checkpoint, options.model)
    own = isinstance(preset.network, UNetConfig)
    data, images = choose_data(options.data or (preset.training.data if own else None), preset.network)
    if images is not None:
        there, _ = (len(split_names(images, split)) for split in ("train", "test"))
        preset = replace(
            preset,
            fisher_digits=min(preset.fisher_digits, there),
            fisher_grid_digits=min(preset.fisher_grid_digits, there),
        )
    sampler, steps, eta = choose_method(options.sampler, options.steps, options.eta, preset)
    if options.inception_weights is not None and options.metric != "inception":
        raise UserError(f"--inception-weights {options.inception_weights}: goes with --metric inception only")
    if options.metric == "mnist" and images is not None:
        raise UserError("--metric mnist: its features are of digits; use --metric random, or inception")
    if options.engine == "openvino" and device.type != "cpu":
        raise UserError(f"--engine openvino: runs on the CPU, not on {device}; give --device cpu")
    if options.engine == "torch" and options.precision in INTEGER_PRECISIONS:
        raise UserError(
            f"--precision {options.precision}: torch has no 8-bit convolutions; give --engine openvino as well"
        )
    sampling = Sampling(
        images=options.images or preset.images,
        sampler=sampler,
        steps=steps,
        eta=eta,
        batch_size=options.batch_size or (250 if device.type == "cuda" else 50),
        seed=options.seed,
        device=device_name(device),
        precision=options.precision,
        engine=engine_name(options.engine, options.precision, data),
    )
    if options.seed + options.seeds - 1 > LARGEST_SEED:
        raise UserError(f"--seeds {options.seeds}: the last seed would be above {LARGEST_SEED}; give a smaller --seed")
    metric = options.metric or ("mnist" if images is None else metric_of_images(sampling.images, options.samples))
    return Run(
        preset_name=name,
        why=why,
        preset=preset,
        training=replace(preset.training, data=data),
        model=options.model,
        checkpoint=options.checkpoint or options.model or preset_checkpoint(name),
        data=data,
        images=images,
        data_dir=options.data_dir,
        fmt=options.format,
        timestep_weighting=options.timestep_weighting,
        curvature=options.curvature,
        device=device,
        sampling=sampling,
        seeds=options.seeds,
        samples=options.samples,
        metric=metric,
        inception_weights=options.inception_weights,
        out=options.out or Path("results") / name,
        dry_run=options.dry_run,
    )


def choose_method(sampler: str | None, steps: int | None, eta: float | None, preset: Preset) -> tuple[str, int, float]:
    """(sampler, steps, eta) of --sampler, --steps and --eta; what is not given is as the others imply, or the preset's.
    Raises UserError."""
    few = "dpm++" if steps and preset.sampler == "ddpm" else preset.sampler
    implied = few if eta is None else "ddim"
    sampler = sampler or implied
    timesteps = preset.network.timesteps
    steps = steps or (timesteps if sampler == "ddpm" else preset.steps)
    if sampler == "ddpm" and steps != timesteps:
        raise UserError(f"--steps {steps}: --sampler ddpm takes all {timesteps} steps; use --sampler dpm++ for fewer")
    if steps > timesteps:
        raise UserError(f"--steps {steps}: there are {timesteps} timesteps; give at most as many")
    if sampler != "ddim" and eta is not None:
        raise UserError(f"--eta {eta:g}: goes with --sampler ddim only")
    return sampler, steps, 1.0 if sampler != "ddim" else preset.eta if eta is None else eta


def choose_network(asked: str | None, checkpoint: Path | None, model: Path | None) -> tuple[str, str, Preset]:
    """The preset's name, why it is that, and the preset; of a --model, or a checkpoint of one, its own name and the
    settings of the quick preset. Raises UserError."""
    if model is not None:
        if asked is not None:
            raise UserError(f"--preset {asked}: is a network of this project, and --model another; name one of them")
        return model_name(model), str(model), preset_of(read_configs(model)[0])
    if asked is None and checkpoint is not None and os.path.lexists(checkpoint):
        packed = read_checkpoint(checkpoint)
        if isinstance(packed.config, DiffusersConfig):
            return name_of(packed.metadata.get("preset", "")), "the checkpoint's", preset_of(packed.config)
    name, why = choose_preset(asked, checkpoint)
    return name, why, PRESETS[name]


def preset_of(network: Architecture) -> Preset:
    """What is sampled and measured by default of a network, of diffusers say, that is of no preset. Its training has a
    part in finetuning alone: the seed."""
    return replace(PRESETS["quick"], network=network, steps=min(PRESETS["quick"].steps, network.timesteps))


def model_name(folder: Path) -> str:
    """What a --model is called: its folder's name, or that of the folder above unet/."""
    path = folder.absolute().resolve()
    return name_of((path.parent if path.name == "unet" else path).name)


def name_of(text: str) -> str:
    """The text as a name of a folder, and of no preset."""
    name = re.sub(r"[^\w.-]+", "-", text)[:60].strip("-.") or "model"
    return f"{name}-model" if name in PRESETS else name


def layers_of_model(folder: Path) -> list[str]:
    """The layers of a --model, in the order of the forward pass. Raises UserError."""
    return layers_in_order(layer_weights(tensor_shapes(read_configs(folder)[0])))


def choose_data(asked: str | Path | None, network: Architecture) -> tuple[str, Path | None]:
    """What --data is called, and the folder of images, if it is one. Raises UserError where it does not fit."""
    shape = network.image_shape
    if asked is None:
        raise UserError(f"--data: name a folder of images, as the model was trained on; it makes {shape_text(shape)}")
    if asked in DIGITS:
        if shape != UNetConfig.image_shape:
            raise UserError(
                f"--data {asked}: grey 32x32 digits, and the model makes {shape_text(shape)}; name a folder"
            )
        return asked, None
    if isinstance(network, UNetConfig):
        raise UserError(f"--data {asked}: a folder of images goes with --model; use mnist or mnist5k")
    return describe_folder(asked), asked


def shape_text(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{width}x{height} images of {channels} channel" + ("s" if channels > 1 else "")


def metric_of_images(images: int, samples: bool) -> str:
    """Inception, where its weights are there and images are enough for its features; else random features."""
    enough = samples and images > INCEPTION_DIMENSIONS
    return "inception" if enough and inception_file().is_file() else "random"


def choose_preset(asked: str | None, checkpoint: Path | None) -> tuple[str, str]:
    """The preset's name, and why it is that. Raises UserError where the checkpoint is of none that is known."""
    if asked is not None:
        return asked, "--preset"
    if checkpoint is not None and os.path.lexists(checkpoint):
        name = read_checkpoint(checkpoint).metadata.get("preset")
        if name not in PRESETS:
            raise UserError(f"--checkpoint {checkpoint}: made with preset {name}, unknown here; give --preset")
        return name, "the checkpoint's"
    return ("paper", "CUDA is available") if torch.cuda.is_available() else ("quick", "no CUDA device here")


def start(options: argparse.Namespace, **training: int) -> Run:
    """`resolve`, and then what a run begins with: sets up torch, joins the processes, says what will be used and why,
    and checks the folders that will be written. Under --dry-run prints sizes and cost instead, and ends the program.
    training: fields of it that are not the preset's."""
    set_up_torch()
    run = resolve(options)
    run = replace(run, training=replace(run.training, **training))
    device = distributed.start(run.device)
    sampling = replace(run.sampling, device=distributed.broadcast(device_name(device)))
    run = replace(run, device=device, sampling=sampling)
    threads, processes = torch.get_num_threads(), distributed.processes()
    workers = f"{threads} threads" if processes == 1 else f"{processes} processes of {threads} threads"
    print(f"{run.name} ({run.why}); {run.sampling.device}, {workers}, torch {torch.__version__}")
    if run.samples:
        first, last = run.sampling.seed, run.sampling.seed + run.seeds - 1
        seeds = f"seed {first}" if first == last else f"each of seeds {first} to {last}"
        print(
            f"{run.sampling.images} images, {run.sampling.method}, batch {run.sampling.batch_size}, "
            f"{run.sampling.precision} by {run.sampling.engine}, {seeds}; data {run.data}; {run.out}/"
        )
    if run.dry_run:
        print_sizes(run)
        raise SystemExit(0)
    distributed.on_first(run.results.rows)  # raises where the file is damaged
    image_mib = math.prod(run.preset.network.image_shape) / MIB
    images_mib = (
        2 * run.seeds * run.sampling.images * image_mib if run.samples else 0
    )  # of one model, whole and in parts
    for folder in (run.out, *(run.out / name for name in ("images", "models", "reference"))):
        require_writable(f"--out {run.out}", folder, needed_mib=32 * size_mib(run.preset.network, {}) + images_mib)
    if run.images is not None:
        for split in ("test", "train"):
            run.load_images(split)  # kept; raises where one of them cannot be used, before any long work
    if run.samples:
        require_memory(run.sampling.images, image_mib)
    return run


def require_memory(images: int, image_mib: float) -> None:
    """Raises UserError where images of so many MiB and their features (about 4 KiB each) would not fit in this
    machine's memory."""
    needed = images * (4 / 1024 + image_mib)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
    if needed > there:
        raise UserError(f"--images {images}: takes {needed:,.0f} MiB of memory, {there:,.0f} are there; give fewer")


def require_writable(given: str, folder: Path, needed_mib: float) -> None:
    """Makes nothing. Raises UserError, which names the option as it was `given`, where files could not be made in
    `folder`, which need not be there yet, or where the disk has too little room."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise UserError(f"{given}: {folder} cannot be written ({error.strerror}); name another folder") from None
    if free / MIB < needed_mib:
        raise UserError(f"{given}: {free / MIB:.0f} MiB free in {folder}, {needed_mib:.0f} needed; name another folder")


def require_writable_file(option: str, path: Path) -> None:
    """The same of a file of at most 1 MiB, which may be there."""
    try:
        other = path.exists() and not path.is_file()
    except OSError as error:  # as of a name too long
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from None
    if other:
        raise UserError(f"{option} {path}: is there and not a file; name another")
    require_writable(f"{option} {path}", path.parent, needed_mib=1)


def print_sizes(run: Run) -> None:
    """What --dry-run shows: parameters, sizes and cost."""
    config = run.preset.network
    shapes = tensor_shapes(config)
    names = layer_weights(shapes)
    baseline = size_mib(config, {})
    print(
        f"{weights_of(config):,} parameters in {len(shapes)} tensors; the strategies choose among {len(names)} weights"
    )
    if not run.is_own:
        layers = layers_in_order(names)
        print("layers: " + ", ".join(f"{number} {layer}" for number, layer in enumerate(layers, start=1)))
    print(f"baseline FP32 {baseline:.2f} MiB")
    for fmt in dict.fromkeys(("fp16", run.fmt)):
        size = size_mib(config, dict.fromkeys(names, fmt))
        print(f"uniform {fmt.upper()} {size:.2f} MiB ({1 - size / baseline:.2%} smaller)")
    print(cost_estimate(run))


def cost_estimate(run: Run) -> str:
    """Times one small batch, forward and backward, and says what sampling and training take at that rate."""
    network = build(run.preset.network).to(run.device, memory_format=torch.channels_last)
    batch, shape = run.training.batch_size if run.device.type == "cuda" else 8, run.preset.network.image_shape
    x, t = torch.randn(batch, *shape, device=run.device), torch.zeros(batch, dtype=torch.long, device=run.device)

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

    sampling_seconds = seconds(forward) * run.seeds * run.sampling.images * run.sampling.steps
    text = f"cost on this device, roughly: {duration(sampling_seconds)} for the images of one row"
    text += "" if run.sampling.engine == "torch" else " by torch, and less by OpenVINO"
    if not run.is_own:
        return text
    training_seconds = seconds(train_step) * run.training.batch_size * run.training.steps
    text += f", {duration(training_seconds)} to train the baseline"
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


def read_checkpoint(path: Path, option: str = "--checkpoint") -> Model:
    """The model of a file. Raises UserError naming the option where it cannot be read, or is none."""
    try:
        if not path.is_file() and os.stat(path):  # which raises where it is a loop of links
            raise UserError(f"{option} {path}: is not a file; name a model's file")
        return load_model(path)
    except OSError as error:
        remedy = "give the name of a file that is there" if error.errno == errno.ENOENT else "name another file"
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); {remedy}") from None
    except UserError as error:
        raise UserError(f"{option} {error}" if not str(error).startswith(option) else str(error)) from None
