"""The one path that every script takes: options -> baseline -> Fisher -> quantize -> sample -> measure -> rows."""

import argparse
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.choose.controls import nearest_format, random_order, smallest_first, within
from common.choose.layers import layer_of, layer_weights
from common.ddpm.digits import load_digits
from common.ddpm.sampling import generate, image_file
from common.errors import UserError
from common.formats.numbers import stored_bytes, stored_format
from common.formats.packed import MIB, Model, save_model, size_mib, tensor_shapes
from common.metrics.features import load_features
from common.metrics.scores import Reference, Scores, describe, load_reference, psnr, require_enough, score
from common.presets import FORMATS
from common.runtime import distributed
from common.runtime.device import derive_seed
from common.study import report
from common.study.diffusion_fisher import fisher_table
from common.study.run import Run, preset_checkpoint, print_sizes, require_writable, settle
from common.training.baseline import find_baseline, load_baseline, load_checkpoint, train_baseline

PUBLISHED_BASELINE = (22.7512, 134.2)
PUBLISHED_UNIFORM = (24.1324, 67.7)


@dataclass(frozen=True)
class Choice:
    """One row of a strategy. `rule` takes the normalised Fisher values of the layers' weights, {name: value}, and
    returns the names to quantize; `published` is (FID, MiB) of the row published for it in FP16, if any."""

    strategy: str
    setting: str
    rule: Callable[[dict[str, float]], set[str]]
    published: tuple[float | None, float] | None = None


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
    weights, label = model.sha256, model.metadata["label"]
    images = generate(model.network(), weights, run.sampling, run.device, run.out / "images", label)
    return Measured(weights, images, score(images, bench.network, bench.reference))


def make_row(run: Run, bench: Bench, model: Model, measured: Measured, baseline: Measured | None) -> dict:
    """One row of the table, as JSON: settings, sizes, figures with errors, and the formats of all tensors."""
    row = {
        **settings_of(run, bench, model.metadata.get("baseline", measured.weights)),
        "label": model.metadata["label"] + ("" if run.sampling.precision == "fp32" else f" [{run.sampling.precision}]"),
        "strategy": model.metadata.get("strategy", "Baseline"),
        "setting": model.metadata.get("setting", ""),
        "format": model.metadata.get("format", "fp32"),
        "published": model.metadata.get("published"),
        "size_mib": model.size_mib(),
        "weights": measured.weights,
        "image_file": str(image_file(run.out / "images", run.sampling, measured.weights)),
        "formats": model.formats,
        "kept": kept_by_layer(model),
        **figures(measured.scores),
    }
    return row if baseline is None or baseline.weights == measured.weights else row | differences(measured, baseline)


def baseline_row(run: Run, bench: Bench, baseline: Model, measured: Measured, path: Path) -> dict:
    """The row of the baseline, whose file is at `path`."""
    row = make_row(run, bench, baseline, measured, None)
    metadata = {"published": PUBLISHED_BASELINE, "file": str(path), "digits_seen": baseline.metadata["digits_seen"]}
    return row | metadata


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


def differences(measured: Measured, baseline: Measured) -> dict:
    """What a row holds of the baseline's images of the same noise: paired differences, with their errors, and PSNR."""
    found = {}
    for key in ("fid", "kid"):
        difference, error = getattr(measured.scores, key).minus(getattr(baseline.scores, key))
        found |= {f"{key}_difference": difference, f"{key}_difference_error": error}
    decibels, error = psnr(measured.images, baseline.images)
    if np.isfinite(decibels):  # equal images have none, nor has JSON a number for it
        found |= {"psnr": decibels, "psnr_error": error}
    return found


def kept_by_layer(model: Model) -> dict[str, list[str]]:
    """The weights of layers 1 to 6 that stay FP32, by layer."""
    kept: dict[str, list[str]] = {f"layer{i}": [] for i in range(1, 7)}
    for name in layer_weights(model.state):
        if model.formats[name] == "fp32":
            kept[layer_of(name)].append(name.split(".", 1)[1].removesuffix(".weight"))
    return kept


def measured_row(run: Run, bench: Bench, baseline: Model, label: str, measured: Measured, original: Measured) -> dict:
    """The row of images that no packed model made: figures, and differences to the baseline's images `original`."""
    metadata = settings_of(run, bench, baseline.sha256) | {"label": label, "weights": measured.weights}
    return metadata | figures(measured.scores) | differences(measured, original)


def real_rows(run: Run, bench: Bench, baseline: str | None) -> list[dict]:
    """The row of real test digits: what a perfect model would score with as many images. None, and a line that says
    so, where there are too few digits for it."""
    if len(bench.test_digits) <= bench.network.dimensions:
        print(f"{len(bench.test_digits)} test digits in {run.data} are too few for a row of real digits: --data mnist")
        return []
    scores = score(bench.test_digits, bench.network, bench.reference)
    label = f"Real test digits ({len(bench.test_digits)})"
    return [{**settings_of(run, bench, baseline), "label": label, **figures(scores)}]


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
    metadata = about_row(run, baseline, "Uniform", "", PUBLISHED_UNIFORM)
    return baseline.quantize(layer_weights(baseline.state), run.fmt, metadata)


def run_strategy(options: argparse.Namespace, choices: list[Choice]) -> None:
    """What a strategy script does: baseline and uniform rows, then one row for each choice."""

    def build(run: Run, bench: Bench, baseline: Model) -> list[Model]:
        table = fisher_table(run, baseline)
        values = table.at(run.fisher_timestep, layer_weights(table.names))
        models = []
        for choice in choices:
            metadata = about_row(run, baseline, choice.strategy, choice.setting, choice.published)
            models.append(baseline.quantize(choice.rule(values), run.fmt, metadata))
            if options.controls:
                models += control_models(run, baseline, models[-1], options.controls)
        return list({model.metadata["label"]: model for model in models}.values())

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
    beside = f"{chosen.metadata['strategy']} {chosen.metadata['setting']}".strip()
    orders = {f"Random {i + 1}": random_order(names, run.sampling.seed, i) for i in range(draws)}
    orders["Smallest weights"] = smallest_first(baseline.state, names)
    models = []
    for kind, order in orders.items():
        metadata = about_row(run, baseline, kind, f"as {beside}", None)
        models.append(baseline.quantize(within(order, savings, total), run.fmt, metadata))
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
    origin = baseline.sha256 if baseline is not None else models[0].metadata["baseline"]
    rows = real_rows(run, bench, origin)
    baseline_measured = None
    if baseline is not None:
        baseline_measured = measure(run, bench, baseline)
        rows.append(baseline_row(run, bench, baseline, baseline_measured, baseline_path))
    for model in models:
        path = packed_file(run, model)
        if distributed.rank() == 0:
            save_model(path, model)
        distributed.barrier()
        row = make_row(run, bench, model, measure(run, bench, model), baseline_measured)
        rows.append(row | {"file": str(path), "file_mib": path.stat().st_size / MIB})
    if distributed.rank() == 0:
        report.add_rows(run.out / "results.jsonl", rows)
    print(report.format_table(rows))
    print(report.format_kept(rows))
    print(f"rows: {run.out / 'results.jsonl'}; packed models: {run.out / 'models'}/")
    print(f"all rows and figures: python -m common report --preset {run.preset_name} --out {run.out}")


def packed_file(run: Run, model: Model) -> Path:
    label = re.sub(r"(?<= )-(?=[.\d])", "minus ", model.metadata["label"].lower())
    slug = re.sub(r"[^a-z0-9.]+", "-", label).strip("-")
    return run.out / "models" / f"{slug}.safetensors"


def run_baseline(
    options: argparse.Namespace, retrain: bool, training_steps: int | None, keep_every: int | None
) -> None:
    """What simplediffusion.py does: train where needed, then the rows of the baseline and of the uniform model; or,
    where --checkpoint is a packed model, that model's row under its baseline's."""
    run = settle(options)
    if training_steps is not None:
        run = replace(run, training=replace(run.training, steps=training_steps))
    if run.dry_run:
        print_sizes(run)
        return
    missing = distributed.broadcast(not run.checkpoint.exists())
    if missing and options.checkpoint is not None and not retrain:
        load_checkpoint(run)  # raises: a file that was named is not made by guessing
    for option, value in (("--training-steps", training_steps), ("--keep-every", keep_every)):
        if value is not None and not (missing or retrain):
            raise UserError(f"{option} {value}: {run.checkpoint} is trained; give --retrain as well")
    if missing or retrain:
        bench = make_bench(run)
        require_writable("--checkpoint", run.checkpoint.parent, needed_mib=5 * size_mib(run.preset.network, {}))
        model = train_baseline(run, keep_every)
    else:
        model = load_checkpoint(run)
        bench = make_bench(run)
    if model.is_baseline:
        if not (missing or retrain):
            print(
                f"found trained: {run.checkpoint} ({model.metadata['digits_seen']:,} digits seen); --retrain trains anew"
            )
        table = fisher_table(run, model)
        print(report.format_tensors(model, table))
        print_rows(run, bench, model, run.checkpoint, [uniform(run, model)])
    else:
        print_rows(run, bench, find_baseline(run, model), preset_checkpoint(run.preset_name), [model])
