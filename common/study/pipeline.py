"""The one path that every script takes: options -> baseline -> Fisher -> quantize -> sample -> measure -> rows."""

import argparse
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common.choose.controls import (
    generator_of,
    like_tensors,
    nearest_format,
    permuted_choice,
    smallest_first,
    within,
)
from common.choose.fixed_rounding import FixedRounding
from common.choose.layers import layer_weights
from common.errors import UserError
from common.formats.numbers import stored_bytes, stored_format
from common.formats.packed import MIB, Model, file_bytes, save_model, size_mib, tensor_shapes
from common.presets import FORMATS
from common.runtime import distributed
from common.runtime.files import write_atomically
from common.study import baselines
from common.study.codings import make_in_turn
from common.study.diffusion_fisher import (
    curvature_metadata,
    curvature_table,
    fisher_table,
    rounding_feedback,
    rounding_inputs,
    values_note,
)
from common.study.evaluate import Evaluator, baseline_row, make_evaluator, model_row, real_rows, said_of, settings_of
from common.study.held_out import HeldOut, Judged, format_losses, held_out, judge
from common.study.memorised import compared_with_training, format_nearest
from common.study.output_bias import affordable_maps, measure_outputs
from common.study.report import format_kept, format_table
from common.study.rows import Row
from common.study.run import Run, start
from common.study.tensors import format_layers, format_tensors, tensors_file

PUBLISHED_UNIFORM = (24.1324, 67.7)
WEIGHTING_NOTES = {"uniform": "Fisher over all timesteps", "image": "Fisher by weight in the image"}
ROUNDING_NOTES = {"least-error": "least error", "feedback": "feedback"}


@dataclass(frozen=True)
class Choice:
    """One row of a strategy. `rule` takes the normalised values of the layers' weights, {name: value}, and
    returns the names to quantize; `published` is (FID, MiB) of the row published for it in FP16, if any."""

    strategy: str
    setting: str
    rule: Callable[[dict[str, float]], set[str]]
    published: tuple[float | None, float] | None = None


def quantized_metadata(
    run: Run, baseline: Model, strategy: str, setting: str = "", published: tuple | None = None, **more
) -> dict:
    """What a quantized model says of itself; `more`: the draw of a control, and a rounding that is not to the
    nearest."""
    values = values_note(run, WEIGHTING_NOTES.get(run.timestep_weighting, "")) if setting else None
    notes = [values, ROUNDING_NOTES.get(more.get("rounding"))]
    name = " ".join(map(str, filter(None, [strategy, more.get("draw"), setting])))
    return {
        "label": f"{name} ({', '.join(filter(None, [run.fmt.upper(), *notes]))})",
        "strategy": strategy,
        "setting": setting,
        "format": run.fmt,
        "baseline": baseline.sha256,
        **({"weighting": run.timestep_weighting} | curvature_metadata(run) if setting else {}),
        **({"published": published} if published and run.fmt == "fp16" and run.is_own else {}),
        **more,
    }


def uniform(run: Run, baseline: Model, rounding: str = "nearest") -> Model:
    """Every weight of layers 1 to 6 in --format, its integers chosen by one of `presets.ROUNDINGS`. With feedback, the
    other layers are adapted too, in FP32."""
    other = {} if rounding == "nearest" else {"rounding": rounding}
    metadata = quantized_metadata(run, baseline, "Uniform", published=PUBLISHED_UNIFORM, **other)
    by = FixedRounding(rounding, rounding_feedback(run, baseline) if rounding == "feedback" else {})
    make = partial(Model.quantize, names=layer_weights(baseline.state), fmt=run.fmt, metadata=metadata)
    if rounding != "feedback":
        return make(baseline, quantizer=by.quantize)
    maps = affordable_maps(file_bytes(make(baseline)))  # however it is rounded
    bias = measure_outputs(run, baseline) if maps else None
    inputs = rounding_inputs(run, baseline)

    def made() -> Model:
        model = make_in_turn(baseline, partial(make, quantizer=by.quantize), by, inputs)
        return bias.correct(model, maps) if bias else model

    return distributed.on_first(made)  # sums on a GPU may round otherwise in each process


def run_strategy(options: argparse.Namespace, choices: list[Choice]) -> None:
    """What a strategy script does: baseline and uniform rows, then one row for each choice."""

    def build(run: Run, evaluator: Evaluator, baseline: Model) -> Iterator[Model | Judged]:
        table = curvature_table(run, baseline)
        values = table.at(run.timestep_weighting, layer_weights(table.names))
        return quantized(run, baseline, values)

    def quantized(run: Run, baseline: Model, values: dict[str, float]) -> Iterator[Model | Judged]:
        digits = held_out(run, baseline) if options.controls else None
        for choice in choices:
            metadata = quantized_metadata(run, baseline, choice.strategy, choice.setting, choice.published)
            model = baseline.quantize(choice.rule(values), run.fmt, metadata)
            if digits is None:
                yield model
            else:
                yield from judge(digits, model, permuted_models(run, baseline, choice, values, options.controls))
                yield from control_models(run, baseline, model, digits)

    run_models(options, build)


def permuted_models(run: Run, baseline: Model, choice: Choice, values: dict[str, float], draws: int) -> Iterator[Model]:
    """The models of the same rule where Fisher values have nothing to say: permuted among tensors of like size."""
    shapes = tensor_shapes(baseline.config)
    strata = like_tensors({name: shapes[name][0] for name in values})
    savings, whole = savings_of(run, baseline), baseline.size_mib() * MIB

    def size(chosen: set[str]) -> float:
        return whole - sum(savings[name] for name in chosen)

    for draw in range(1, draws + 1):
        rng = generator_of(run.sampling.seed, choice.strategy, choice.setting, draw)
        metadata = quantized_metadata(run, baseline, "Permuted", _beside(choice.strategy, choice.setting), draw=draw)
        yield baseline.quantize(permuted_choice(choice.rule, values, strata, size, rng), run.fmt, metadata)


def savings_of(run: Run, baseline: Model) -> dict[str, int]:
    """The bytes that --format saves of each weight of layers 1 to 6."""
    shapes = tensor_shapes(baseline.config)
    return {
        name: stored_bytes(shape, "fp32") - stored_bytes(shape, stored_format(run.fmt, shape), axis)
        for name, (shape, axis) in ((name, shapes[name]) for name in layer_weights(baseline.state))
    }


def _beside(strategy: str, setting: str) -> str:
    """The setting of a control: whose it is."""
    return f"as {strategy} {setting}".strip()


def control_models(run: Run, baseline: Model, chosen: Model, digits: HeldOut) -> Iterator[Judged]:
    """Models that save as many bytes as `chosen`, or as nearly as whole tensors allow, by choices that know nothing
    of Fisher information: that of the smallest weights, the next larger where one does not fit, and uniform at the
    nearest width."""

    savings = savings_of(run, baseline)
    total = sum(saved for name, saved in savings.items() if chosen.formats[name] != "fp32")
    beside = _beside(chosen.metadata["strategy"], chosen.metadata["setting"])
    metadata = quantized_metadata(run, baseline, "Smallest weights", beside)
    smallest = within(smallest_first(baseline.state, list(savings)), savings, total)
    model = baseline.quantize(smallest, run.fmt, metadata)
    yield Judged(model, digits.increase(model), size_apart=abs(model.size_mib() / chosen.size_mib() - 1))
    uniform_sizes = {fmt: size_mib(baseline.config, dict.fromkeys(savings, fmt)) for fmt in FORMATS[1:]}
    nearest = replace(run, fmt=nearest_format(uniform_sizes, chosen.size_mib()))
    if nearest.fmt != run.fmt:
        model = uniform(nearest, baseline)
        yield Judged(model, digits.increase(model))


def run_models(options: argparse.Namespace, build: Callable[[Run, Evaluator, Model], Iterable[Model | Judged]]) -> None:
    """Baseline and uniform rows, then one row for each model that `build` makes of the baseline.

    What `build` does at once comes before anything is sampled; the models may be made as they are asked for."""
    run = start(options)
    baseline = baselines.load_baseline(run)
    evaluator = make_evaluator(run)
    built = build(run, evaluator, baseline)
    models = itertools.chain([uniform(run, baseline)], built)
    if not run.is_own:
        models = judged(held_out(run, baseline), models)
    print_rows(run, measure_models(run, evaluator, baseline.sha256, baseline, run.checkpoint, models))


def judged(digits: HeldOut, models: Iterable[Model | Judged]) -> Iterator[Judged]:
    """The models, with the increase of the loss on held-out images of those that have none yet."""
    for made in models:
        yield made if isinstance(made, Judged) else Judged(made, digits.increase(made))


def measure_models(
    run: Run,
    evaluator: Evaluator,
    origin: str | None,
    baseline: Model | None,
    baseline_path: Path,
    models: Iterable[Model | Judged],
) -> list[Row]:
    """The rows of the real digits, the baseline (where there is one) and the models, which all came from the baseline
    of hash `origin`.

    Each model is packed, measured and let go before the next is made, and its row is kept at once.
    """
    rows: dict[tuple, Row] = {}

    def keep(row: Row) -> None:
        rows[row.identity] = row
        if distributed.rank() == 0:
            run.results.add([row])

    for row in real_rows(run, evaluator, origin):
        keep(row)
    settings, original = settings_of(run, evaluator, origin), None
    if baseline is not None:
        original = evaluator.measure(baseline)
        keep(baseline_row(settings, baseline, original, baseline_path))
    for made in models:
        model, said = (made.model, made.said()) if isinstance(made, Judged) else (made, {})
        path = packed_file(run.out, model)
        if distributed.rank() == 0:
            save_model(path, model)
        distributed.barrier()
        keep(model_row(settings, model, evaluator.measure(model), original, path, **said))
    return list(rows.values())


def print_rows(run: Run, rows: list[Row]) -> None:
    print(format_table(rows))
    print("\n".join(filter(None, [format_nearest(rows), format_losses(rows), format_kept(rows)])))
    print(f"rows: {run.results.path}; packed models: {run.out / 'models'}/")
    which = f"--preset {run.preset_name} " if run.is_own else ""
    print(f"all rows and figures: python -m common report {which}--out {run.out}")


def packed_file(out: Path, model: Model) -> Path:
    """A file of its own for each label and weights: what a row points to stays what it was."""
    label = re.sub(r"(?<= )-(?=[.\d])", "minus ", model.metadata["label"].lower())
    slug = re.sub(r"[^a-z0-9.]+", "-", label).strip("-")
    return out / "models" / f"{slug}-{model.sha256[:8]}.safetensors"


def _refuse_training(given: dict[str, int | bool | None]) -> None:
    """Raises UserError where an option of training, {option: value}, was given with a model of diffusers."""
    for option, value in given.items():
        if value:
            raise UserError(f"{option}: is not needed with --model, which is trained already; leave it out")


def run_baseline(
    options: argparse.Namespace,
    retrain: bool,
    changed: dict[str, int],
    keep_every: int | None,
    original: Path | None,
) -> None:
    """What simplediffusion.py does: train where needed, then the rows of the baseline and of the uniform model; or,
    where --checkpoint is a packed model, that model's row under those of its baseline, which `original` may name.
    `changed`: fields of the training that are not the preset's, {"steps" or "seed": value}."""
    run = start(options, **changed)
    named = options.checkpoint is not None
    given = {f"--training-{name}": value for name, value in changed.items()} | {"--keep-every": keep_every}
    if not run.is_own:
        _refuse_training({"--retrain": retrain} | given)
    there = distributed.on_first(lambda: baselines.is_there(run.checkpoint))
    if not there and named and not retrain:
        baselines.load_checkpoint(run)  # raises: a file that was named is not made by guessing
    trains = retrain or not there
    for option, value in given.items():
        if value is not None and not trains:
            raise UserError(f"{option} {value}: {run.checkpoint} is trained; give --retrain as well")
    if keep_every is not None and keep_every >= run.training.steps:
        raise UserError(f"--keep-every {keep_every}: the training has {run.training.steps} steps; give fewer")
    if trains:
        if original is not None:
            raise UserError(f"--baseline {original}: goes with a packed --checkpoint; leave it out")
        evaluator = make_evaluator(run)
        distributed.on_first(lambda: baselines.check_training(run, named))
        model = baselines.train(run, keep_every)
    else:
        model = baselines.load_checkpoint(run)
        if original is not None and model.is_baseline:
            raise UserError(f"--baseline {original}: {run.checkpoint} is a baseline itself; leave the option out")
    if not model.is_baseline:
        said_of(model)  # raises, before any work, where no row can hold it
        for option, value, usual in (("--format", run.fmt, "fp16"), ("--rounding", options.rounding, "nearest")):
            if value != usual:
                raise UserError(f"{option} {value}: {run.checkpoint} is quantized already; leave the option out")
        baseline, path = baselines.original_of(run, model, original)
        origin = model.metadata.get("baseline")
        print_rows(run, measure_models(run, make_evaluator(run), origin, baseline, path, [model]))
        return
    if not trains:
        if run.is_own:
            seen = f"{model.metadata['digits_seen']:,} digits seen"
            print(f"found trained: {run.checkpoint} ({seen}); --retrain trains anew")
        evaluator = make_evaluator(run)
    table, path = fisher_table(run, model), tensors_file(run.out, model.sha256)
    print(format_layers(model, table))
    print(f"each tensor: {path}")
    distributed.on_first(lambda: write_atomically(path, f"{format_tensors(model, table)}\n".encode()))
    models = [uniform(run, model, options.rounding)]
    if not run.is_own:
        models = judged(held_out(run, model), models)
    rows = measure_models(run, evaluator, model.sha256, model, run.checkpoint, models)
    if model.metadata.get("training", {}).get("data") == run.data:
        training, test = (run.load_images(part) for part in ("train", "test"))
        rows = compared_with_training(rows, training, test, run.device)
        if distributed.rank() == 0:
            run.results.add(rows)
    print_rows(run, rows)
