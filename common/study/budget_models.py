"""Models that fit a size: the baseline coded in files of given limits, or in the smallest that costs little."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from common.choose import allocation
from common.choose.allocation import WIDTHS, BudgetError, fixed_formats
from common.choose.controls import random_order
from common.choose.feedback import Feedback
from common.ddpm.schedule import Schedule
from common.errors import UserError
from common.formats import entropy
from common.formats.numbers import stored_bytes
from common.formats.packed import MIB, Model, file_bytes, load_model, save_model, tensor_shapes
from common.options import number
from common.runtime import distributed
from common.runtime.files import remove
from common.study.budget_search import describe_confirmation, describe_search, lies_below, margin_of, search
from common.study.diffusion_fisher import fisher_table, rounding_feedback, training_digits
from common.study.evaluate import Evaluator
from common.study.rows import Figure
from common.study.run import Run, training_precision
from common.training.finetune import finetune, sampler_of_digits, state_key

GROWTH = 0.01  # of the file, for codes to become longer in finetuning


class Allocator(Protocol):
    """One coding of a baseline."""

    def smallest(self, metadata: dict) -> int:
        """Bytes of the smallest file there is, whatever the Fisher values."""

    def fit(self, limit: int, values: dict[str, float], metadata: dict) -> Model:
        """The model of least Fisher-weighted error whose file has at most `limit` bytes. Raises BudgetError."""


@dataclass(frozen=True)
class EntropyCoding:
    """Steps by Fisher values, rounded by `feedback`, entropy-coded."""

    baseline: Model
    feedback: dict[str, Feedback]

    def smallest(self, metadata: dict) -> int:
        zeros = {name: np.zeros(tuple(weight.shape), np.int64) for name, weight in self.baseline.state.items()}
        return file_bytes(coded_model(self.baseline, entropy.encode(zeros, dict.fromkeys(zeros, 1.0)), metadata))

    def fit(self, limit: int, values: dict[str, float], metadata: dict) -> Model:
        def size(stored) -> int:
            return file_bytes(coded_model(self.baseline, stored, metadata))

        left = {name: value * self._gain(name) for name, value in values.items()}
        stored = allocation.entropy_coded(self.baseline.state, left, size, limit, self.feedback)
        return coded_model(self.baseline, stored, metadata)

    def _gain(self, name: str) -> float:
        """The share of a weight's error that is left once its neighbours have made good the rest."""
        return self.feedback[name].gain if name in self.feedback else 1.0


@dataclass(frozen=True)
class FixedWidths:
    """One format for each tensor, the best choice there is."""

    baseline: Model

    def smallest(self, metadata: dict) -> int:
        return file_bytes(self._in_formats(self._narrowest(), metadata))

    def fit(self, limit: int, values: dict[str, float], metadata: dict) -> Model:
        shapes = tensor_shapes(self.baseline.config)
        axes = {name: axis for name, (_, axis) in shapes.items()}
        least = sum(stored_bytes(shapes[name][0], fmt, axes[name]) for name, fmt in self._narrowest().items())
        header = 0
        while True:  # until the header, whose length follows from the formats, fits too
            formats = fixed_formats(self.baseline.state, axes, values, max(least, limit - header))
            model = self._in_formats(formats, metadata)
            excess = file_bytes(model) - limit
            if excess <= 0:
                return model
            if limit - header <= least:
                raise BudgetError(file_bytes(model))
            header += excess

    def _narrowest(self) -> dict[str, str]:
        """The format of fewest bytes of each tensor."""
        return {
            name: min(WIDTHS if len(shape) > 1 else WIDTHS[-2:], key=lambda fmt: stored_bytes(shape, fmt, axis))
            for name, (shape, axis) in tensor_shapes(self.baseline.config).items()
        }

    def _in_formats(self, formats: dict[str, str], metadata: dict) -> Model:
        model = replace(self.baseline, metadata=metadata)
        for fmt in set(formats.values()):
            model = model.quantize([name for name, chosen in formats.items() if chosen == fmt], fmt, metadata)
        return model


def coded_model(baseline: Model, stored: dict[str, torch.Tensor], metadata: dict) -> Model:
    """The model of what `common.formats.entropy` stores."""
    return Model(baseline.config, stored, dict.fromkeys(baseline.state, "entropy"), metadata)


def budget_metadata(run: Run, baseline: Model, coding: str, size: str, variant: str | None = None, **more) -> dict:
    """What a model of a given size says of itself: `size` as it was asked for, `variant` and its number in `more`
    (draw or updates). Every byte counts, so nothing is said that the baseline's own file says."""
    words = {"finetuned": f"{more.get('updates')} updates", "random": f"random {more.get('draw')}"}
    setting = ", ".join(filter(None, [size, words.get(variant, variant)]))
    former = {"first": ", Fisher timestep 1", "uniform": ", Fisher timestep all", "image": ""}[run.timestep_weighting]
    kept = {key: value for key, value in baseline.metadata.items() if key not in ("loss_curve", "precision")}
    return kept | {
        "label": f"Budget {setting} ({coding}{former})",
        "strategy": "Budget",
        "setting": setting,
        **({"variant": variant} if variant else {}),
        "format": coding,
        "weighting": run.timestep_weighting,
        "baseline": baseline.sha256,
        **more,
    }


def build(
    run: Run,
    evaluator: Evaluator,
    baseline: Model,
    coding: str,
    limits: dict[str, int],
    updates: int | None,
    draws: int | None,
    share: float,
) -> Iterator[Model]:
    """One model for each limit, {what was asked for: bytes}; without limits those of `search`, finetuned where
    `updates` are given, for a margin that is this `share` of the baseline's FID.

    After each one with so many `updates` of finetuning, and those of `other_values` with so many random `draws`.

    Raises UserError at once, before any work, for a limit that is too small.
    """
    size = baseline.size_mib() * MIB
    longest = budget_metadata(run, baseline, coding, max(limits, key=len, default=""))
    least = _allocator(baseline, coding, {}).smallest(longest) + 100  # labels of other lengths
    for asked, limit in limits.items():
        if limit < least:
            more, less = math.ceil(1e4 * least / MIB) / 1e4, math.floor(10 * size / least) / 10
            raise UserError(
                f"{asked}, {limit:,} bytes, cannot be reached with {coding} coding: "
                f"ask for --size {more:g} or more, --times {less:g} or less"
            )
    maker = Maker(run, baseline, coding)
    if limits:
        return _build_to_limits(maker, limits, updates, draws)
    return _build_by_search(maker, evaluator, updates, size / least, share)


def _build_to_limits(maker: "Maker", limits: dict[str, int], updates: int | None, draws: int | None) -> Iterator[Model]:
    baseline, seed = maker.baseline, maker.run.sampling.seed
    for asked, limit in tqdm(limits.items(), desc="fitting", unit="file"):
        yield from maker.make(asked, limit, updates)
        for variant, draw, values in other_values(baseline.state, maker.values, seed, draws or 0):
            more = {"draw": draw} if draw else {}
            yield maker.fit(limit, values, maker.metadata(asked, variant, **more))


def _build_by_search(
    maker: "Maker", evaluator: Evaluator, updates: int | None, most: float, share: float
) -> Iterator[Model]:
    """The models that `search` tried, least factor first. One is acceptable where the paired difference of its unbiased
    FID to FP32's, and two standard errors more, lie below the margin (`margin_of`): fewer images, whose errors are
    larger, find a smaller factor. The largest is then measured again, on noise that had no part in the search."""
    size = maker.baseline.size_mib() * MIB
    reference = evaluator.measure(maker.baseline).scores.fid_unbiased
    margin = margin_of(reference, share)
    tried: dict[float, Model] = {}

    def acceptable(times: float) -> bool:
        *_, model = maker.make(f"{number(times)}x", int(size / times), updates)
        difference = Figure(*evaluator.measure(model).scores.fid_unbiased.minus(reference))
        tried[times] = replace(model)  # without the unpacked weights
        return lies_below(difference, margin)

    low, high = search(acceptable, most)
    print(describe_search(low, high, list(tried), margin))
    if low is not None:
        fresh = replace(evaluator, sampling=replace(evaluator.sampling, seed=evaluator.sampling.seed + evaluator.seeds))
        again = fresh.measure(tried[low]).scores.fid_unbiased
        difference = Figure(*again.minus(fresh.measure(maker.baseline).scores.fid_unbiased))
        print(describe_confirmation(low, difference, margin, fresh.sampling.seed, fresh.seeds))
    yield from (tried[times] for times in sorted(tried))


class Maker:
    """Fits models of one baseline by its Fisher values, {tensor: value}, which it measures."""

    def __init__(self, run: Run, baseline: Model, coding: str):
        self.run, self.baseline, self.coding = run, baseline, coding
        table = fisher_table(run, baseline)
        shrunk = allocation.shrink(*table.estimates(run.fisher_timestep))
        self.values = dict(zip(table.names, shrunk.tolist(), strict=True))
        self._allocator = _allocator(baseline, coding, rounding_feedback(run, baseline) if coding == "entropy" else {})

    def metadata(self, asked: str, variant: str | None = None, **more) -> dict:
        return budget_metadata(self.run, self.baseline, self.coding, asked, variant, **more)

    def fit(self, limit: int, values: dict[str, float], metadata: dict) -> Model:
        """The allocator's model, made by one process: sums on a GPU may round otherwise in each. Raises BudgetError."""
        return distributed.on_first(lambda: self._allocator.fit(limit, values, metadata))

    def make(self, asked: str, limit: int, updates: int | None) -> Iterator[Model]:
        """The model of at most `limit` bytes, and then, with so many `updates`, the finetuned one."""
        metadata = self.metadata(asked)
        yield self.fit(limit, self.values, metadata)
        if updates:
            try:
                smaller = self.fit(int((1 - GROWTH) * limit), self.values, metadata)
                metadata = self.metadata(asked, "finetuned", updates=updates)
                yield finetuned(self.run, self.baseline, smaller, metadata, limit, updates)
            except BudgetError as error:  # the other rows are not lost
                tqdm.write(f"{asked}: the finetuned codes need {error.smallest:,} bytes, so there is no row of them")


def _allocator(baseline: Model, coding: str, feedback: dict[str, Feedback]) -> Allocator:
    return EntropyCoding(baseline, feedback) if coding == "entropy" else FixedWidths(baseline)


def finetuned(run: Run, baseline: Model, model: Model, metadata: dict, limit: int, updates: int) -> Model:
    """An entropy-coded model with the steps of `model`, its codes trained to predict what the baseline does; the file
    keeps to `limit` bytes. Training makes codes a little longer, so `model` should be smaller by `GROWTH`. Raises
    BudgetError.

    The result is kept, and found by the same command again; the state of the training, ten times as large, goes.
    """
    steps = dict(zip(model.state, model.stored["entropy:steps"].tolist(), strict=True))
    precision, seed = training_precision(run.device), run.training.seed
    key = state_key(baseline.sha256, model.sha256, steps, run.data, seed, precision, updates)
    state_path = run.out / f"finetuning-{key[:16]}.safetensors"
    kept_path = run.out / "finetuned" / f"{key[:16]}-{limit}.safetensors"
    kept = distributed.on_first(lambda: _kept_result(kept_path, metadata))
    if kept is None:
        schedule = Schedule(baseline.config.timesteps, run.device)
        draw = sampler_of_digits(training_digits(run), schedule, seed)
        network = baseline.network().to(run.device, memory_format=torch.channels_last)
        weights = finetune(network, model.state, steps, draw, schedule, updates, precision, state_path)

        def size(stored) -> int:
            return file_bytes(coded_model(baseline, stored, metadata))

        stored = distributed.on_first(lambda: allocation.requantize_to_size(weights, steps, size, limit))
        kept = coded_model(baseline, stored, metadata)
        if distributed.rank() == 0:
            save_model(kept_path, kept)
    if distributed.rank() == 0:
        remove(state_path)
    return kept


def _kept_result(path: Path, metadata: dict) -> Model | None:
    """The model of an earlier finetuning, if it is there, whole and says the same of itself."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise UserError(f"{path}: is not a file, and a model has to be kept there; move it away")
    try:
        model = load_model(path)
    except (UserError, OSError) as error:
        tqdm.write(f"{error}; it is made anew")
        return None
    return model if model.metadata == json.loads(json.dumps(metadata)) else None


def other_values(
    weights: dict[str, torch.Tensor], values: dict[str, float], seed: int, draws: int
) -> Iterator[tuple[str, int | None, dict[str, float]]]:
    """(variant, draw, values): what might stand in the place of the Fisher `values`: the same for all, so that squared
    errors count alike; mean squared weights; and `draws` in which the values went to other tensors at random. Feedback
    stays as it is. None where `draws` is 0."""
    if not draws:
        return
    yield "unweighted", None, dict.fromkeys(values, 1.0)
    yield "magnitude", None, {name: max(1e-30, float(weights[name].square().mean())) for name in values}
    for draw in range(draws):
        order = random_order(list(values), seed, draw)
        yield "random", draw + 1, dict(zip(values, (values[name] for name in order), strict=True))
