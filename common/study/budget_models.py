"""Models that fit a size: the baseline coded in files of given limits, or in the smallest that loses nothing."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm import tqdm

from common.choose import allocation
from common.choose.allocation import BudgetError, fixed_formats
from common.choose.controls import random_order
from common.choose.feedback import Feedback
from common.ddpm.schedule import Schedule
from common.errors import UserError
from common.formats.packed import MIB, Model, file_bytes, tensor_shapes
from common.runtime import distributed
from common.study.diffusion_fisher import fisher_table, rounding_feedback, training_digits
from common.study.pipeline import Bench, measure
from common.study.run import Run, training_precision
from common.training.finetune import finetune, sampler_of_digits

START, STRIDE, RESOLUTION = 16.0, 1.25, 1.06  # of the search for a factor
GROWTH = 0.01  # of the file, for codes to become longer in finetuning

Limited = Callable[[Model, dict[str, float], dict, int, dict[str, Feedback]], Model]


def entropy_coded(
    baseline: Model, values: dict[str, float], metadata: dict, limit: int, feedback: dict[str, Feedback]
) -> Model:
    """The model with steps by Fisher `values`, rounded by `feedback`, whose file has at most `limit` bytes. Raises
    BudgetError."""

    def size(stored) -> int:
        return file_bytes(coded_model(baseline, stored, metadata))

    return coded_model(baseline, allocation.entropy_coded(baseline.state, values, size, limit, feedback), metadata)


def coded_model(baseline: Model, stored: dict[str, torch.Tensor], metadata: dict) -> Model:
    """The model of what `common.entropy` stores."""
    return Model(baseline.config, stored, dict.fromkeys(baseline.state, "entropy"), metadata)


def finetuned(run: Run, baseline: Model, model: Model, limit: int, updates: int) -> Model:
    """An entropy-coded model with the steps of `model`, its codes trained to predict what the baseline does; the file
    keeps to `limit` bytes. Training makes codes a little longer, so `model` should be smaller by `GROWTH`. Raises
    BudgetError."""
    schedule = Schedule(baseline.config.timesteps)
    steps = dict(zip(model.state, model.stored["entropy:steps"].tolist(), strict=True))
    draw = sampler_of_digits(training_digits(run), schedule, run.training.seed)
    network = baseline.network().to(run.device, memory_format=torch.channels_last)
    precision = training_precision(run.device)
    key = hashlib.sha256(f"{baseline.sha256} {model.sha256} {run.data} {precision} {updates}".encode()).hexdigest()
    state_path = run.out / f"finetuning-{key[:12]}.safetensors"
    weights = finetune(network, model.state, steps, draw, schedule, updates, precision, state_path)
    setting = f"{model.metadata['setting']}, {updates} updates"
    metadata = model.metadata | {
        "label": model.metadata["label"].replace(model.metadata["setting"], setting),
        "setting": setting,
    }
    stored = allocation.requantize_to_size(
        weights, steps, lambda stored: file_bytes(coded_model(baseline, stored, metadata)), limit
    )
    return coded_model(baseline, stored, metadata)


def fixed_widths(
    baseline: Model, values: dict[str, float], metadata: dict, limit: int, feedback: dict[str, Feedback]
) -> Model:
    """The model with one format for each tensor whose file has at most `limit` bytes; feedback is not used. Raises
    BudgetError."""
    axes = {name: axis for name, (_, axis) in tensor_shapes(baseline.config).items()}
    header = 0
    while True:
        try:
            formats, fits = fixed_formats(baseline.state, axes, values, limit - header), True
        except BudgetError as error:
            formats, fits = error.formats, False
        model = replace(baseline, metadata=metadata)
        for fmt in set(formats.values()):
            model = model.quantize([name for name, chosen in formats.items() if chosen == fmt], fmt, metadata)
        excess = file_bytes(model) - limit
        if not fits and excess > 0:
            raise BudgetError(file_bytes(model))
        if excess <= 0:
            return model
        header += excess


CODINGS: dict[str, Limited] = {"entropy": entropy_coded, "fixed": fixed_widths}


def smallest(baseline: Model, coding: str, metadata: dict) -> int:
    """Bytes of the smallest file there is, whatever the Fisher values."""
    try:
        CODINGS[coding](baseline, dict.fromkeys(baseline.state, 1.0), metadata, 0, {})
    except BudgetError as error:
        return error.smallest


def build(
    run: Run,
    bench: Bench,
    baseline: Model,
    coding: str,
    limits: dict[str, int],
    updates: int | None,
    draws: int | None,
) -> list[Model]:
    """One model for each limit, {what was asked for: bytes}; without limits those of `search`, finetuned where
    `updates` are given.

    After each one with so many `updates` of finetuning, and those of `other_values` with so many random `draws`.

    Raises UserError, before any work, for a limit that is too small.
    """

    def metadata(setting: str) -> dict:
        note = "" if run.fisher_timestep == "image" else f", Fisher timestep {run.fisher_timestep}"
        kept = {key: value for key, value in baseline.metadata.items() if key != "loss_curve"}
        return kept | {
            "label": f"Budget {setting} ({coding}{note})",
            "strategy": "Budget",
            "setting": setting,
            "format": coding,
            "published": None,
            "baseline": baseline.sha256,
        }

    size = baseline.size_mib() * MIB
    least = smallest(baseline, coding, metadata(max(limits, key=len, default=""))) + 100  # labels of other lengths
    for asked, limit in limits.items():
        if limit < least:
            more, less = math.ceil(1e4 * least / MIB) / 1e4, math.floor(10 * size / least) / 10
            raise UserError(
                f"{asked}, {limit:,} bytes, cannot be reached with {coding} coding: "
                f"ask for --size {more:g} or more, --times {less:g} or less"
            )
    table = fisher_table(run, baseline)
    shrunk = allocation.shrink(*table.estimates(run.fisher_timestep))
    values = dict(zip(table.names, shrunk.tolist(), strict=True))
    feedback = rounding_feedback(run, baseline) if coding == "entropy" else {}

    def make(setting: str, limit: int, values: dict[str, float] = values) -> Model:
        gains = {name: feedback[name].gain if name in feedback else 1.0 for name in values}
        left = {name: value * gains[name] for name, value in values.items()}  # once neighbours have made good the rest
        model = CODINGS[coding](baseline, left, metadata(setting), limit, feedback)
        return distributed.broadcast(model)  # sums on a GPU may round otherwise in each process

    def make_all(asked: str, limit: int) -> list[Model]:
        models = [make(asked, limit)]
        if updates:
            try:
                smaller = make(asked, int((1 - GROWTH) * limit))
                models.append(distributed.broadcast(finetuned(run, baseline, smaller, limit, updates)))
            except BudgetError as error:  # the other rows are not lost
                tqdm.write(f"{asked}: the finetuned codes need {error.smallest:,} bytes, so there is no row of them")
        return models

    if limits:
        models = []
        for asked, limit in tqdm(limits.items(), desc="fitting", unit="file"):
            models += make_all(asked, limit)
            if draws:
                others = other_values(baseline.state, values, run.sampling.seed, draws)
                models += [make(f"{asked}, {kind}", limit, other) for kind, other in others.items()]
        return models
    return search(run, bench, baseline, lambda times: make_all(f"{times:g}x", int(size / times))[-1], size / least)


def other_values(
    weights: dict[str, torch.Tensor], values: dict[str, float], seed: int, draws: int
) -> dict[str, dict[str, float]]:
    """What might stand in the place of the Fisher `values`: the same for all, so that squared errors count alike; mean
    squared weights; and `draws` in which the values went to other tensors at random. Feedback stays as it is."""
    others = {
        "unweighted": dict.fromkeys(values, 1.0),
        "magnitude": {name: max(1e-30, float(weights[name].square().mean())) for name in values},
    }
    for i in range(draws):
        order = random_order(list(values), seed, i)
        others[f"random {i + 1}"] = dict(zip(values, (values[name] for name in order), strict=True))
    return others


def search(run: Run, bench: Bench, baseline: Model, make: Callable[[float], Model], most: float) -> list[Model]:
    """Walks from `START` in strides to where the difference of FID to FP32 comes to exceed its standard error, then
    halves the last stride.

    Returns the models that were tried, by size; prints the smallest that keeps within. make(times) is the model that
    many times smaller than FP32, at most `most`.
    """
    reference = measure(run, bench, baseline).scores.fid
    tried: dict[float, Model] = {}

    def within(times: float) -> bool:
        tried[times] = make(times)
        difference, error = measure(run, bench, tried[times]).scores.fid.minus(reference)
        return difference <= error

    low = high = min(START, math.floor(10 * most) / 10)
    if within(low):
        while (high := float(f"{low * STRIDE:.3g}")) <= most and within(high):
            low = high
    else:
        while (low := float(f"{high / STRIDE:.3g}")) >= 1 and not within(low):
            high = low
    while low in tried and high in tried and high / low > RESOLUTION:
        times = float(f"{(low * high) ** 0.5:.3g}")
        low, high = (times, high) if within(times) else (low, times)
    further = f"the next tried, {high:g}, is not" if high in tried else "nothing larger was tried"
    if low in tried:
        print(f"largest factor whose FID is within one standard error of FP32's: {low:g}; {further}")
    else:
        print(
            f"no factor that was tried, {', '.join(f'{t:g}' for t in sorted(tried))}, keeps within one standard error"
        )
    return [tried[times] for times in sorted(tried)]
