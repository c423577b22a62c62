"""Models that fit a size: the baseline coded in files of given limits, or in the smallest that costs little."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from common.choose import allocation
from common.choose.allocation import BudgetError
from common.choose.controls import generator_of, like_tensors, permute
from common.errors import UserError
from common.formats.packed import MIB, MOST_CODED_WEIGHTS, Model, weights_of
from common.options import number
from common.runtime import distributed
from common.study.budget_search import (
    START,
    START_FINETUNED,
    describe_confirmation,
    describe_search,
    lies_below,
    margin_of,
    search,
)
from common.study.codings import Allocator, make_allocator
from common.study.diffusion_fisher import (
    curvature_metadata,
    curvature_table,
    rounding_feedback,
    rounding_inputs,
    values_note,
)
from common.study.evaluate import Evaluator
from common.study.finetuned import finetuned
from common.study.held_out import Judged, held_out, judge
from common.study.output_bias import BYTES_OF_A_MAP, affordable_maps, measure_outputs
from common.study.rows import Figure
from common.study.run import Run

# What finetuning starts from, in shares of the file. Of finer codes fewer are lost where the price of bits takes codes
# toward zero; but few updates cannot shrink a file without harm (docs/your-own-model.md).
START_SHARE, START_SHARE_OF_FEW, FEW = 1.2, 0.98, 600
SLACK = 200  # bytes: what the headers of other models of a size, with longer labels, may take


def budget_metadata(run: Run, baseline: Model, coding: str, size: str, variant: str | None = None, **more) -> dict:
    """What a model of a given size says of itself: `size` as it was asked for, `variant` and its number in `more`
    (draw or updates), and there the rounding of integers that is not to the nearest. Every byte counts, so nothing is
    said that the baseline's own file says."""
    words = {"finetuned": f"{more.get('updates')} updates", "permuted": f"permuted {more.get('draw')}"}
    setting = ", ".join(filter(None, [size, words.get(variant, variant)]))
    former = {"first": "Fisher timestep 1", "uniform": "Fisher timestep all", "image": ""}[run.timestep_weighting]
    rounding = more.get("rounding", "").replace("-", " ")
    coded = ", ".join(filter(None, [coding, rounding, values_note(run, former)]))
    kept = {key: value for key, value in baseline.metadata.items() if key not in ("loss_curve", "precision")}
    return kept | {
        "label": f"Budget {setting} ({coded})",
        "strategy": "Budget",
        "setting": setting,
        **({"variant": variant} if variant else {}),
        "format": coding,
        "weighting": run.timestep_weighting,
        **curvature_metadata(run),
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
    rounding: str = "nearest",
) -> Iterator[Model | Judged]:
    """One model for each limit, {what was asked for: bytes}; without limits those of `search`, finetuned where
    `updates` are given, for a margin that is this `share` of the baseline's FID.

    After each one with so many `updates` of finetuning; and where there are `draws`, its place among so many models
    whose Fisher values were permuted, some of these, and those of `other_values`. rounding: of integers.

    Raises UserError at once, before any work, for a limit that is too small.
    """
    most = require_reachable(run, baseline, coding, limits)
    maker = Maker(run, baseline, coding, rounding)
    if limits:
        return _build_to_limits(maker, limits, updates, draws)
    return _build_by_search(maker, evaluator, updates, most, share)


def limits_of(baseline: Model, factors: list[float]) -> dict[str, int]:
    """{what was asked for: bytes}: of files so many times smaller than the baseline's tensors."""
    return {f"{number(times)}x": int(baseline.size_mib() * MIB / times) for times in factors}


def require_reachable(run: Run, baseline: Model, coding: str, limits: dict[str, int]) -> float:
    """How many times smaller than the baseline's tensors a file can be. Raises UserError for a limit below."""
    size, weights = baseline.size_mib() * MIB, weights_of(baseline.config)
    if coding == "entropy" and weights > MOST_CODED_WEIGHTS:
        raise UserError(
            f"--coding entropy: the network has {weights:,} weights, and entropy-coded files hold at most "
            f"{MOST_CODED_WEIGHTS:,}; use --coding fixed"
        )
    longest = budget_metadata(run, baseline, coding, max(limits, key=len, default=""))
    least = make_allocator(baseline, coding, {}).smallest(longest) + SLACK
    for asked, limit in limits.items():
        if limit < least:
            more, less = math.ceil(1e4 * least / MIB) / 1e4, math.floor(10 * size / least) / 10
            raise UserError(
                f"{asked}, {limit:,} bytes, cannot be reached with {coding} coding: "
                f"ask for --size {more:g} or more, --times {less:g} or less"
            )
    return size / least


def _build_to_limits(
    maker: "Maker", limits: dict[str, int], updates: int | None, draws: int | None
) -> Iterator[Model | Judged]:
    digits = held_out(maker.run, maker.baseline) if draws else None
    for asked, limit in tqdm(limits.items(), desc="fitting", unit="file"):
        made = maker.make(asked, limit, updates)
        if digits is None:
            yield from made
            continue
        yield from judge(digits, next(made), maker.permuted(asked, limit, draws))
        yield from (Judged(model, digits.increase(model)) for model in made)
        for variant, values in other_values(maker.baseline.state, maker.values).items():
            model = maker.fit(limit, values, maker.metadata(asked, variant))
            yield Judged(model, digits.increase(model))


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
        asked, limit = f"{number(times)}x", int(size / times)
        if updates:
            model = next(maker.finetuned_if_it_fits(asked, limit, updates), None)
        else:
            model = maker.untrained(asked, limit)
        if model is None:
            return False
        difference = Figure(*evaluator.measure(model).scores.fid_unbiased.minus(reference))
        tried[times] = replace(model)  # without the unpacked weights
        return lies_below(difference, margin)

    low, high = search(acceptable, most, START_FINETUNED if updates else START)
    print(describe_search(low, high, list(tried), margin))
    if low is not None:
        fresh = replace(evaluator, sampling=replace(evaluator.sampling, seed=evaluator.sampling.seed + evaluator.seeds))
        again = fresh.measure(tried[low]).scores.fid_unbiased
        difference = Figure(*again.minus(fresh.measure(maker.baseline).scores.fid_unbiased))
        print(describe_confirmation(low, difference, margin, fresh.sampling.seed, fresh.seeds))
    yield from (tried[times] for times in sorted(tried))


def tensor_values(run: Run, baseline: Model) -> dict[str, float]:
    """{tensor: its value of --curvature, pulled toward the others where it is uncertain}"""
    table = curvature_table(run, baseline)
    shrunk = allocation.shrink(*table.estimates(run.timestep_weighting))
    return dict(zip(table.names, shrunk.tolist(), strict=True))


class Maker:
    """Fits models of one baseline by its Fisher values, or those of --curvature, {tensor: value}, which it measures, as
    it does the feedback that the coding, or the rounding of integers, needs."""

    def __init__(self, run: Run, baseline: Model, coding: str, rounding: str = "nearest"):
        self.run, self.baseline, self.coding = run, baseline, coding
        self.values = tensor_values(run, baseline)
        self.rounding, needed = rounding, coding == "entropy" or rounding == "feedback"
        self.feedback = rounding_feedback(run, baseline) if needed else {}
        self.bias = measure_outputs(run, baseline) if needed else None
        self.inputs = rounding_inputs(run, baseline) if needed else None
        self._allocator = make_allocator(baseline, coding, self.feedback, rounding, self.bias, self.inputs)

    def metadata(self, asked: str, variant: str | None = None, **more) -> dict:
        more |= {} if self.rounding == "nearest" else {"rounding": self.rounding}
        return budget_metadata(self.run, self.baseline, self.coding, asked, variant, **more)

    def fit(self, limit: int, values: dict[str, float], metadata: dict, allocator: Allocator | None = None) -> Model:
        """The model of the coding, or of another `allocator`, made by one process: sums on a GPU may round otherwise in
        each. Raises BudgetError."""
        return distributed.on_first(lambda: (allocator or self._allocator).fit(limit, values, metadata))

    def make(self, asked: str, limit: int, updates: int | None) -> Iterator[Model]:
        """The model of at most `limit` bytes, and then, with so many `updates`, the finetuned one."""
        yield self.untrained(asked, limit)
        if updates:
            yield from self.finetuned_if_it_fits(asked, limit, updates)

    def finetuned_if_it_fits(self, asked: str, limit: int, updates: int) -> Iterator[Model]:
        """`finetuned`, or a line that says that there is none, so that other rows are not lost."""
        try:
            yield self.finetuned(asked, limit, updates)
        except BudgetError as error:
            tqdm.write(f"{asked}: the finetuned codes need {error.smallest:,} bytes, so there is no row of them")

    def untrained(self, asked: str, limit: int) -> Model:
        """The model of at most `limit` bytes by its own values. Raises BudgetError."""
        return self.fit(limit, self.values, self.metadata(asked))

    def finetuned(self, asked: str, limit: int, updates: int) -> Model:
        """The model of at most `limit` bytes after so many updates, which begin without maps of the output's bias and
        leave room for them. Raises BudgetError."""
        maps = affordable_maps(limit) if self.bias else 0
        of_codes = limit - maps * BYTES_OF_A_MAP
        share = START_SHARE_OF_FEW if updates < FEW else START_SHARE
        coding = replace(self._allocator, bias=None, by_rows=True)
        start = self.fit(int(share * of_codes), self.values, self.metadata(asked), coding)
        metadata = self.metadata(asked, "finetuned", updates=updates)
        trained = finetuned(self.run, self.baseline, start, metadata, of_codes, updates)
        return distributed.on_first(lambda: self.bias.correct(trained, maps, limit)) if maps else trained

    def permuted(self, asked: str, limit: int, draws: int) -> Iterator[Model]:
        """The models of at most `limit` bytes by Fisher values that were permuted among tensors of like size. Feedback
        stays as it is."""
        strata = like_tensors({name: weight.shape for name, weight in self.baseline.state.items()})
        for draw in range(1, draws + 1):
            values = permute(self.values, strata, generator_of(self.run.sampling.seed, "Budget", asked, draw))
            yield self.fit(limit, values, self.metadata(asked, "permuted", draw=draw))


def other_values(weights: dict[str, torch.Tensor], values: dict[str, float]) -> dict[str, dict[str, float]]:
    """{variant: values}: what might stand in the place of the Fisher `values`: the same for all, so that squared errors
    count alike; mean squared weights. Feedback stays as it is."""
    return {
        "unweighted": dict.fromkeys(values, 1.0),
        "magnitude": {name: max(1e-30, float(weights[name].square().mean())) for name in values},
    }
