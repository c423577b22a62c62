"""The one path that every script takes: options -> baseline -> Fisher -> quantize -> sample -> measure -> rows."""

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import checkpoint, distributed, fisher, report
from common.checkpoint import CheckpointError
from common.config import FORMATS, PRESETS, Preset, TrainingConfig, UserError
from common.controls import nearest_format, random_order, smallest_first, within
from common.data import load_digits, to_model_range
from common.device import autocast, bf16_is_faster, choose_device, derive_seed, set_true_fp32
from common.diffusion import NoiseStreams, Schedule, denoising_loss
from common.features import load_features
from common.feedback import Feedback, measure_feedback
from common.gradients import SampleLoss
from common.layers import layer_of, layer_weights
from common.metrics import Reference, Scores, describe, load_reference, psnr, require_enough, score
from common.model import MIB, Model, full_precision, load_model, save_model, size_mib, tensor_shapes
from common.quantization import stored_bytes, stored_format
from common.sampling import Sampling, generate, image_file
from common.training import train
from common.unet import UNet

FISHER_GRID = 20  # timesteps, at the centres of equal parts of 0..T-1
FISHER_SEED = 0
PUBLISHED_BASELINE = (22.7512, 134.2)
PUBLISHED_UNIFORM = (24.1324, 67.7)
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def preset_checkpoint(preset_name: str) -> Path:
    """Where a preset's baseline is kept."""
    return CHECKPOINTS / f"{preset_name}.safetensors"


@dataclass(frozen=True)
class Choice:
    """One row of a strategy. `rule` takes the normalised Fisher values of the layers' weights, {name: value}, and
    returns the names to quantize; `published` is (FID, MiB) of the row published for it in FP16, if any."""

    strategy: str
    setting: str
    rule: Callable[[dict[str, float]], set[str]]
    published: tuple[float | None, float] | None = None


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
    sampling: Sampling
    metric: str
    inception_weights: Path | None
    out: Path
    dry_run: bool

    @property
    def device(self) -> torch.device:
        return torch.device(self.sampling.device)


def settle(options: argparse.Namespace) -> Run:
    """Fills defaults, checks everything that can be checked before any work, and prints what will be used and why.

    Raises UserError naming the option, its value and the remedy.
    """
    set_true_fp32()
    device = distributed.start(choose_device(options.device))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    name, why = options.preset, "--preset"
    if name is None and options.checkpoint is not None and options.checkpoint.exists():
        name, why = read_checkpoint(options.checkpoint).about.get("preset"), "the checkpoint's"
        if name not in PRESETS:
            raise UserError(f"--checkpoint {options.checkpoint}: made with preset {name}, unknown here; give --preset")
    if name is None:
        name, why = ("paper", "CUDA is available") if torch.cuda.is_available() else ("quick", "no CUDA device here")
    preset = PRESETS[name]
    implied = "ddim" if options.steps or options.eta is not None else preset.sampler
    sampler = options.sampler or implied
    timesteps = preset.network.timesteps
    default_steps = timesteps if sampler == "ddpm" else preset.ddim_steps
    steps = options.steps or default_steps
    if sampler == "ddpm" and steps != timesteps:
        raise UserError(f"--steps {steps}: --sampler ddpm takes all {timesteps} steps; use --sampler ddim for fewer")
    if steps > timesteps:
        raise UserError(f"--steps {steps}: there are {timesteps} timesteps; give at most as many")
    if sampler == "ddpm" and options.eta is not None:
        raise UserError(f"--eta {options.eta:g}: goes with --sampler ddim only")
    if options.inception_weights is not None and options.metric != "inception":
        raise UserError(f"--inception-weights {options.inception_weights}: goes with --metric inception only")
    if not 0 <= options.seed < 2**64:
        raise UserError(f"--seed {options.seed}: must lie in 0..2^64 - 1")
    sampling = Sampling(
        images=options.images or preset.images,
        sampler=sampler,
        steps=steps,
        eta=1.0 if sampler == "ddpm" else preset.eta if options.eta is None else options.eta,
        batch_size=options.batch_size or (250 if device.type == "cuda" else 50),
        seed=options.seed,
        device=device.type,
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
        sampling=sampling,
        metric=options.metric,
        inception_weights=options.inception_weights,
        out=options.out or Path("results") / name,
        dry_run=options.dry_run,
    )
    threads, processes = torch.get_num_threads(), distributed.processes()
    workers = f"{threads} threads" if processes == 1 else f"{processes} processes of {threads} threads"
    print(f"preset {name} ({why}); {device.type}, {workers}, torch {torch.__version__}")
    print(
        f"{sampling.images} images, {sampling.method}, batch {sampling.batch_size}, {sampling.precision}, "
        f"seed {sampling.seed}; data {run.data}; format {run.fmt}; Fisher timestep {run.fisher_timestep}; {run.out}/"
    )
    if not run.dry_run:
        report.read_rows(run.out / "results.jsonl", absent_is_empty=True)
        _require_writable("--out", run.out, needed_mib=32 * size_mib(preset.network, {}))
    return run


def _require_writable(option: str, folder: Path, needed_mib: float) -> None:
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


def train_baseline(run: Run) -> Model:
    """Trains, or continues training, the preset's baseline; writes it to the checkpoint and returns it."""
    state_path = training_state_file(run)
    digits = load_digits(run.data, "train", run.data_dir)
    precision = training_precision(run.device)
    print(cost_estimate(run))
    print(f"training in {precision}; state in {state_path}, so the same command continues after an interruption")
    state, losses = train(UNet(run.preset.network), run.training, digits, state_path, run.device, precision)
    width = max(1, len(losses) // 200)
    curve = [sum(losses[i : i + width]) / len(losses[i : i + width]) for i in range(0, len(losses), width)]
    about = {
        "label": "Baseline (FP32)",
        "preset": run.preset_name,
        "weights": "ema",
        "training": asdict(run.training),
        "digits_seen": run.training.steps * run.training.batch_size,
        "precision": precision,
        "loss_curve": [round(loss, 6) for loss in curve],
    }
    model = full_precision(run.preset.network, state, about)
    if distributed.rank() == 0:
        save_model(run.checkpoint, model)
        checkpoint.remove(state_path)
    print(f"trained: last loss {curve[-1]:.4f}; {run.checkpoint}")
    return model


def training_state_file(run: Run) -> Path:
    return run.checkpoint.with_suffix(".training.safetensors")


def load_baseline(run: Run) -> Model:
    """The FP32 model of --checkpoint. Raises UserError where it is missing, quantized or of another architecture."""
    model = load_checkpoint(run)
    if not model.is_baseline:
        raise UserError(
            f"--checkpoint {run.checkpoint} is quantized already; strategies start from an FP32 baseline: "
            f"{preset_checkpoint(run.preset_name)}"
        )
    return model


def load_checkpoint(run: Run) -> Model:
    """The model of --checkpoint, of the preset's architecture. Raises UserError."""
    if not run.checkpoint.exists():
        raise UserError(
            f"--checkpoint {run.checkpoint}: no such file; make the baseline with: "
            f"python simplediffusion.py --preset {run.preset_name}"
        )
    model = read_checkpoint(run.checkpoint)
    expected = replace(run.preset.network, dropout=model.config.dropout)
    if model.config != expected:
        raise CheckpointError(
            f"--checkpoint {run.checkpoint} has another architecture, channels {model.config.channels}, than preset "
            f"{run.preset_name}, {expected.channels}; give the --preset that made it"
        )
    return model


def read_checkpoint(path: Path) -> Model:
    """The model of a file that is there. Raises UserError naming --checkpoint."""
    try:
        return load_model(path)
    except OSError as error:
        raise UserError(f"--checkpoint {path}: cannot be read ({error.strerror})") from None


def fisher_table(run: Run, model: Model) -> fisher.FisherTable:
    """Fisher values of the baseline at timestep 1 and on a grid; measured where no file fits the weights."""
    schedule, preset = Schedule(model.config.timesteps), run.preset
    grid = [int((i + 0.5) * schedule.timesteps / FISHER_GRID) for i in range(FISHER_GRID)]
    settings = {
        "data": run.data,
        "digits": preset.fisher_digits,
        "grid_digits": preset.fisher_grid_digits,
        "grid": grid,
    }
    weights = model.sha256
    path = run.out / f"fisher-{weights[:12]}.safetensors"
    if distributed.agree(path.exists()):
        table = fisher.load(path, weights)
        if table.settings == settings:
            return table
    digits = load_digits(run.data, "train", run.data_dir)
    batches = {1: _noised(run, digits, [1] * preset.fisher_digits)} | {
        t: _noised(run, digits, [t] * preset.fisher_grid_digits) for t in grid
    }
    network = model.network().to(run.device)
    table = fisher.measure(network, _diffusion_loss(schedule), batches, weights, settings, schedule.image_weights(grid))
    if distributed.rank() == 0:
        fisher.save(path, table)
    return table


def rounding_feedback(run: Run, model: Model) -> dict[str, Feedback]:
    """What rounding by feedback needs to know of the baseline's weights, from real digits.

    Timesteps lie as densely as they weigh in the finished image.
    """
    schedule, n = Schedule(model.config.timesteps), run.preset.fisher_digits
    share = np.cumsum(schedule.image_weights(list(range(schedule.timesteps))))
    timesteps = np.searchsorted(share / share[-1], (np.arange(n) + 0.5) / n)
    network = model.network().to(run.device)
    samples = _noised(run, load_digits(run.data, "train", run.data_dir), timesteps.tolist())
    return measure_feedback(network, _diffusion_loss(schedule), samples)


def training_digits(run: Run) -> torch.Tensor:
    """The digits that --data trains on, (N, 1, 32, 32) in [-1, 1], on the device."""
    return to_model_range(load_digits(run.data, "train", run.data_dir)).to(run.device)


def _noised(run: Run, digits: torch.Tensor, timesteps: list[int]) -> tuple[torch.Tensor, ...]:
    """What `_diffusion_loss` takes: some of `digits` (uint8), always the same, timesteps (N,), and noise."""
    generator = torch.Generator().manual_seed(derive_seed(FISHER_SEED, "fisher"))
    chosen, n = torch.randperm(len(digits), generator=generator), len(timesteps)
    noise = NoiseStreams(derive_seed(FISHER_SEED, "fisher", timesteps[0]), range(n)).draw(run.device)
    return to_model_range(digits[chosen[:n]]).to(run.device), torch.tensor(timesteps, device=run.device), noise


def _diffusion_loss(schedule: Schedule) -> SampleLoss:
    def loss(call, x0, t, noise):
        return denoising_loss(call, schedule, x0, t, noise)

    return loss


@dataclass(frozen=True)
class Bench:
    """What images are measured with and against."""

    network: nn.Module
    reference: Reference
    test_digits: torch.Tensor


def make_bench(run: Run) -> Bench:
    """The feature network, the statistics of the training digits, and as many test digits as there are images."""
    network = load_features(run.metric, run.device, run.inception_weights)
    require_enough(run.sampling.images, network)
    reference = load_reference(load_digits(run.data, "train", run.data_dir), network, run.out / "reference")
    test = load_digits(run.data, "test", run.data_dir)
    generator = torch.Generator().manual_seed(derive_seed(run.sampling.seed, "test digits"))
    return Bench(network, reference, test[torch.randperm(len(test), generator=generator)[: run.sampling.images]])


@dataclass(frozen=True)
class Measured:
    """Images of a model and their scores."""

    weights: str
    images: torch.Tensor
    scores: Scores


def measure(run: Run, bench: Bench, model: Model) -> Measured:
    """Samples from the model, or reads its images back, and scores them."""
    weights, label = model.sha256, model.about["label"]
    images = generate(model.network(), weights, run.sampling, run.out / "images", label)
    return Measured(weights, images, score(images, bench.network, bench.reference))


def make_row(run: Run, bench: Bench, model: Model, measured: Measured, baseline: Measured | None) -> dict:
    """One row of the table, as JSON: settings, sizes, figures with errors, and the formats of all tensors."""
    row = {
        **settings_of(run, bench, model.about.get("baseline", measured.weights)),
        "label": model.about["label"] + ("" if run.sampling.precision == "fp32" else f" [{run.sampling.precision}]"),
        "strategy": model.about.get("strategy", "Baseline"),
        "setting": model.about.get("setting", ""),
        "format": model.about.get("format", "fp32"),
        "published": model.about.get("published"),
        "size_mib": model.size_mib(),
        "weights": measured.weights,
        "image_file": str(image_file(run.out / "images", run.sampling, measured.weights)),
        "formats": model.formats,
        "kept": kept_by_layer(model),
        **figures(measured.scores),
    }
    if baseline is not None and baseline.weights != measured.weights:
        for key in ("fid", "kid"):
            difference, error = getattr(measured.scores, key).minus(getattr(baseline.scores, key))
            row |= {f"{key}_difference": difference, f"{key}_difference_error": error}
        decibels, error = psnr(measured.images, baseline.images)
        if np.isfinite(decibels):  # equal images have none, nor has JSON a number for it
            row |= {"psnr": decibels, "psnr_error": error}
    return row


def settings_of(run: Run, bench: Bench, baseline: str | None) -> dict:
    """What a row must share with another to be compared with it."""
    return {
        "preset": run.preset_name,
        "baseline": baseline,
        "data": run.data,
        "metric": describe(bench.network),
        "torch": torch.__version__,
        **asdict(run.sampling),
    }


def figures(scores: Scores) -> dict:
    """Values and errors as a row holds them."""
    estimates = {"fid": scores.fid, "kid": scores.kid, "inception_score": scores.inception_score}
    return {k: e.value for k, e in estimates.items()} | {f"{k}_error": e.error for k, e in estimates.items()}


def kept_by_layer(model: Model) -> dict[str, list[str]]:
    """The weights of layers 1 to 6 that stay FP32, by layer."""
    kept: dict[str, list[str]] = {f"layer{i}": [] for i in range(1, 7)}
    for name in layer_weights(model.state):
        if model.formats[name] == "fp32":
            kept[layer_of(name)].append(name.split(".", 1)[1].removesuffix(".weight"))
    return kept


def real_row(run: Run, bench: Bench, baseline: str | None) -> dict:
    """The row of real test digits: what a perfect model would score with as many images."""
    scores = score(bench.test_digits, bench.network, bench.reference)
    label = f"Real test digits ({len(bench.test_digits)})"
    return {**settings_of(run, bench, baseline), "label": label, **figures(scores)}


def about_row(run: Run, baseline: Model, strategy: str, setting: str, published: tuple | None) -> dict:
    """What a quantized model says of itself."""
    which = {"all": "Fisher over all timesteps", "image": "Fisher by weight in the image"}.get(run.fisher_timestep)
    notes = [run.fmt.upper()] + ([which] if which and setting else [])
    return {
        "label": f"{strategy} {setting}".rstrip() + f" ({', '.join(notes)})",
        "strategy": strategy,
        "setting": setting,
        "format": run.fmt,
        "published": published if run.fmt == "fp16" else None,
        "baseline": baseline.sha256,
    }


def uniform(run: Run, baseline: Model) -> Model:
    """Every weight of layers 1 to 6 in --format."""
    about = about_row(run, baseline, "Uniform", "", PUBLISHED_UNIFORM)
    return baseline.quantize(layer_weights(baseline.state), run.fmt, about)


def run_strategy(options: argparse.Namespace, choices: list[Choice]) -> None:
    """What a strategy script does: baseline and uniform rows, then one row for each choice."""

    def build(run: Run, bench: Bench, baseline: Model) -> list[Model]:
        table = fisher_table(run, baseline)
        values = table.at(run.fisher_timestep, layer_weights(table.names))
        models = []
        for choice in choices:
            about = about_row(run, baseline, choice.strategy, choice.setting, choice.published)
            models.append(baseline.quantize(choice.rule(values), run.fmt, about))
            if options.controls:
                models += control_models(run, baseline, models[-1], options.controls)
        return list({model.about["label"]: model for model in models}.values())

    run_models(options, build)


def control_models(run: Run, baseline: Model, chosen: Model, draws: int) -> list[Model]:
    """Models that save as many bytes as `chosen`, or as nearly as whole tensors allow, by choices that know nothing
    of Fisher information: `draws` random ones, that of the smallest weights, and uniform at the nearest width."""
    shapes, names = tensor_shapes(baseline.config), layer_weights(baseline.state)
    savings = {}
    for name in names:
        shape, axis = shapes[name]
        savings[name] = stored_bytes(shape, "fp32") - stored_bytes(shape, stored_format(run.fmt, shape), axis)
    total = sum(savings[name] for name in names if chosen.formats[name] != "fp32")
    beside = f"{chosen.about['strategy']} {chosen.about['setting']}".strip()
    orders = {f"Random {i + 1}": random_order(names, run.sampling.seed, i) for i in range(draws)}
    orders["Smallest weights"] = smallest_first(baseline.state, names)
    models = []
    for kind, order in orders.items():
        about = about_row(replace(run, fisher_timestep=1), baseline, kind, f"as {beside}", None)
        models.append(baseline.quantize(within(order, savings, total), run.fmt, about))
    uniform_sizes = {fmt: size_mib(baseline.config, dict.fromkeys(names, fmt)) for fmt in FORMATS[1:]}
    nearest = replace(run, fmt=nearest_format(uniform_sizes, chosen.size_mib()))
    return models if nearest.fmt == run.fmt else [*models, uniform(nearest, baseline)]


def run_models(options: argparse.Namespace, build: Callable[[Run, Bench, Model], list[Model]]) -> None:
    """Baseline and uniform rows, then one row for each model that `build` makes of the baseline."""
    run = settle(options)
    if run.dry_run:
        print_sizes(run)
        return
    baseline = load_baseline(run)
    bench = make_bench(run)
    models = [uniform(run, baseline), *build(run, bench, baseline)]
    print_rows(run, bench, baseline, run.checkpoint, models)


def print_rows(run: Run, bench: Bench, baseline: Model | None, baseline_path: Path, models: list[Model]) -> None:
    """Measures the models, writes their packed files, prints the table and adds its rows to results.jsonl."""
    origin = baseline.sha256 if baseline is not None else models[0].about["baseline"]
    rows = []
    if len(bench.test_digits) > bench.network.dimensions:
        rows.append(real_row(run, bench, origin))
    else:
        print(f"{len(bench.test_digits)} test digits in {run.data} are too few for a row of real digits: --data mnist")
    baseline_measured = None
    if baseline is not None:
        baseline = replace(baseline, about=baseline.about | {"published": PUBLISHED_BASELINE})
        baseline_measured = measure(run, bench, baseline)
        rows.append(make_row(run, bench, baseline, baseline_measured, None) | {"file": str(baseline_path)})
    for model in models:
        path = packed_file(run, model)
        if distributed.rank() == 0:
            save_model(path, model)
        distributed.wait()
        row = make_row(run, bench, model, measure(run, bench, model), baseline_measured)
        rows.append(row | {"file": str(path), "file_mib": path.stat().st_size / MIB})
    if distributed.rank() == 0:
        report.add_rows(run.out / "results.jsonl", rows)
    print(report.format_table(rows))
    print(report.format_kept(rows))
    print(f"rows: {run.out / 'results.jsonl'}; packed models: {run.out / 'models'}/")
    print(f"all rows and figures: python -m common.report --preset {run.preset_name} --out {run.out}")


def packed_file(run: Run, model: Model) -> Path:
    slug = re.sub(r"[^a-z0-9.]+", "-", model.about["label"].lower()).strip("-")
    return run.out / "models" / f"{slug}.safetensors"


def run_baseline(options: argparse.Namespace, retrain: bool) -> None:
    """What simplediffusion.py does: train where needed, then the rows of the baseline and of the uniform model; or,
    where --checkpoint is a packed model, that model's row under its baseline's."""
    run = settle(options)
    if run.dry_run:
        print_sizes(run)
        return
    missing = distributed.agree(not run.checkpoint.exists())
    if missing and options.checkpoint is not None and not retrain:
        load_checkpoint(run)  # raises: a file that was named is not made by guessing
    if missing or retrain:
        bench = make_bench(run)
        _require_writable("--checkpoint", run.checkpoint.parent, needed_mib=5 * size_mib(run.preset.network, {}))
        model = train_baseline(run)
    else:
        model = load_checkpoint(run)
        bench = make_bench(run)
    if model.is_baseline:
        if not (missing or retrain):
            print(
                f"found trained: {run.checkpoint} ({model.about['digits_seen']:,} digits seen); --retrain trains anew"
            )
        table = fisher_table(run, model)
        print(report.format_tensors(model, table))
        print_rows(run, bench, model, run.checkpoint, [uniform(run, model)])
    else:
        print_rows(run, bench, find_baseline(run, model), preset_checkpoint(run.preset_name), [model])


def find_baseline(run: Run, model: Model) -> Model | None:
    """The baseline that a packed model came from, where the preset's checkpoint is it."""
    path = preset_checkpoint(run.preset_name)
    if path.exists():
        baseline = load_model(path)
        if baseline.sha256 == model.about.get("baseline"):
            return baseline
    print(f"{path} is not the baseline of {run.checkpoint}: no differences to it are given")
    return None
