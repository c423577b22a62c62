"""Controls: permutations that keep what a null hypothesis keeps, and choices that save as much as another, by hand."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from common.choose import controls
from common.choose.layers import layer_weights
from common.choose.rules import below, below_group_mean, below_layer_threshold, below_top_ratio
from common.ddpm.schedule import denoising_loss
from common.formats.packed import full_precision, size_mib, tensor_shapes
from common.options import strategy_parser
from common.presets import PRESETS
from common.study import held_out, pipeline
from common.study.pipeline import Choice
from common.study.run import resolve

RULES = {
    "Threshold": partial(below, threshold=0.1),
    "Groups": partial(below_group_mean, groups="12/3456"),
    "Ratio": partial(below_top_ratio, ratio=0.25),
    "Math": partial(below_layer_threshold, alpha=0.5),
}


def test_like_tensors_are_of_one_kind_and_size():
    shapes = {
        "big": (90, 10),
        "norm": (16,),
        "a": (2, 5),
        "b": (4, 10),
        "other norm": (64,),
        "c": (41, 1),
        "bias": (1,),
    }
    strata = [sorted(names) for names in controls.like_tensors(shapes)]
    # 1 takes 16, the next; 64 is alone then and the last. 10 and 40 are alike, 41 is too large for them.
    assert strata == [["bias", "norm", "other norm"], ["a", "b"], ["big", "c"]]


def test_none_of_the_networks_tensors_is_alone():
    for preset in PRESETS.values():
        shapes = {name: shape for name, (shape, _) in tensor_shapes(preset.network).items()}
        for names in (list(shapes), layer_weights(shapes)):
            strata = controls.like_tensors({name: shapes[name] for name in names})
            assert sorted(itertools.chain(*strata)) == sorted(names) and min(map(len, strata)) > 1
            assert all(len({len(shapes[name]) < 2 for name in group}) == 1 for group in strata)
        assert sum(len({name[:6] for name in group}) > 1 for group in strata) >= 4  # values change their layer


def test_a_permutation_keeps_the_values_of_each_stratum():
    values = {name: float(i) for i, name in enumerate("abcdefgh")}
    strata = [list("hca"), list("bdefg")]
    draws = [controls.permute(values, strata, np.random.default_rng(i)) for i in range(50)]
    for draw in draws:
        assert list(draw) == list(values)
        for names in strata:
            assert sorted(draw[n] for n in names) == sorted(values[n] for n in names)
    counts = np.bincount([int(draw["a"]) for draw in draws], minlength=8)
    assert set(np.flatnonzero(counts)) == {0, 2, 7} and counts.max() < 30


@pytest.fixture
def fisher(tiny_config):
    """Values over many powers of ten, of the weights of layers 1 to 6."""
    names = layer_weights(tensor_shapes(tiny_config))
    values = 10 ** np.random.default_rng(0).normal(-2, 1, len(names))
    return dict(zip(names, (values / values.max()).tolist(), strict=True))


@pytest.fixture
def baseline(tiny_network):
    return full_precision(tiny_network.config, tiny_network.state_dict(), {"label": "Baseline (FP32)"})


@pytest.fixture
def run(tiny_preset):
    return resolve(strategy_parser("").parse_args(["--preset", "quick", "--device", "cpu", "--format", "int4"]))


def choices_of(run, baseline, fisher, strategy, setting="0.25", draws=8):
    choice = Choice(strategy, setting, RULES[strategy])
    return [frozenset(n for n, fmt in m.formats.items() if fmt != "fp32") for m in pipeline.permuted_models(
        run, baseline, choice, fisher, draws
    )]  # fmt: skip


@pytest.mark.parametrize("strategy", RULES)
def test_permuted_models_are_as_large_as_the_rules(run, baseline, fisher, strategy):
    model = baseline.quantize(RULES[strategy](fisher), "int4", {})
    draws = list(pipeline.permuted_models(run, baseline, Choice(strategy, "x", RULES[strategy]), fisher, 10))
    assert all(abs(draw.size_mib() / model.size_mib() - 1) <= controls.NEAR + 1e-9 for draw in draws)
    labels = [draw.metadata["label"] for draw in draws]
    assert labels == [f"Permuted {i} as {strategy} x (INT4)" for i in range(1, 11)]
    assert len({frozenset(draw.formats.items()) for draw in draws}) > 5
    if strategy == "Ratio":  # the rule itself: as many tensors of each layer stay
        for draw in draws:
            kept = [n[:6] for n in fisher if draw.formats[n] == "fp32"]
            assert kept == [n[:6] for n in fisher if model.formats[n] == "fp32"]


def test_draws_follow_from_seed_rule_setting_and_number(run, baseline, fisher):
    draws = choices_of(run, baseline, fisher, "Ratio")
    assert draws == choices_of(run, baseline, fisher, "Ratio") and draws[:3] == choices_of(
        run, baseline, fisher, "Ratio", draws=3
    )
    assert draws != choices_of(run, baseline, fisher, "Ratio", setting="0.250")
    other_seed = replace(run, sampling=replace(run.sampling, seed=1))
    assert draws != choices_of(other_seed, baseline, fisher, "Ratio")
    strata = controls.like_tensors({name: baseline.state[name].shape for name in fisher})
    first, second = (
        controls.permute(fisher, strata, controls.generator_of(0, strategy, "0.1", 1)) for strategy in RULES if
        strategy in ("Ratio", "Threshold")
    )  # fmt: skip
    assert first != second


def test_a_choice_of_no_such_size_is_the_nearest_there_is():
    values, sizes = {"a": 1.0, "b": 2.0}, {"a": 10, "b": 5}

    def rule(values):
        return {min(values, key=values.get)}

    def size(chosen):
        return 100 + sum(sizes[name] for name in chosen)

    rng = np.random.default_rng(0)
    assert controls.permuted_choice(rule, values, [["a", "b"]], size, rng) == {"a"}  # b is 4.5% smaller
    assert controls.permuted_choice(lambda v: {"b"}, values, [["a", "b"]], size, rng) == {"b"}


class Toy:
    """What `judge` asks of a model, and of digits: a loss that is the sum of the chosen tensors'."""

    def __init__(self, chosen, losses):
        self.figure = held_out.Figure(sum(losses[name] for name in chosen), 0.1)

    def increase(self, model):
        return model.figure

    def size_mib(self):
        return 1.0


def places(relation, trials=300, draws=19):
    """(lower, draws) of a rule that spares 12 of 24 like tensors, where `relation` makes Fisher values of losses."""
    found = []
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        names = [f"t{i}" for i in range(24)]
        losses = dict(zip(names, rng.lognormal(size=24), strict=True))
        values = {name: relation(losses[name], rng) for name in names}
        threshold = float(np.median(list(values.values())))
        rule, strata = partial(below, threshold=threshold), controls.like_tensors(dict.fromkeys(names, (4, 4)))
        model = Toy(rule(values), losses)
        permuted = (
            Toy(controls.permuted_choice(rule, values, strata, len, rng), losses) for _ in range(draws)
        )  # fmt: skip
        judged = next(held_out.judge(model, model, permuted))
        found.append(judged.place)
    assert {total for _, total in found} == {draws}
    return np.array([lower for lower, _ in found])


def test_under_the_null_hypothesis_every_place_is_as_likely():
    lower = places(lambda loss, rng: rng.lognormal())
    counts = np.bincount(lower // 4, minlength=5)  # 20 places in five parts of equal chance
    assert ((counts - 60) ** 2 / 60).sum() < 18.5  # chi-squared of 4 degrees of freedom: passed once in 1,000
    assert 0.02 < (lower == 0).mean() < 0.09


def test_values_that_tell_the_loss_do_better_than_all_permutations_and_their_reverse_worse():
    assert places(lambda loss, rng: loss, trials=30).max() == 0
    assert places(lambda loss, rng: 1 / loss, trials=30).min() == 19


def test_a_permutation_that_chooses_the_same_counts_against_the_rule():
    model = Toy({"a"}, {"a": 1.0, "b": 2.0, "c": 0.5})
    draws = [Toy(chosen, {"a": 1.0, "b": 2.0, "c": 0.5}) for chosen in ("a", "b", "c", "b")]
    judged = list(held_out.judge(model, model, draws))
    assert judged[0].place == (2, 4) and [j.model for j in judged] == [model, *draws[:2]]
    assert [j.place for j in judged[1:]] == [None, None] and judged[2].loss_increase.value == 2.0


def test_the_increase_is_that_of_each_digit_with_its_own_noise(run, baseline):
    digits = held_out.held_out(run, baseline, 7)
    assert digits.t.tolist() == [71, 214, 357, 500, 642, 785, 928] and digits.x0.shape == (7, 1, 32, 32)
    assert digits.increase(baseline) == held_out.Figure(0.0, 0.0)
    model = baseline.quantize(layer_weights(baseline.state), "int2", {})
    with torch.no_grad():
        before, after = (
            denoising_loss(m.network(), digits.schedule, digits.x0, digits.t, digits.noise) for m in (baseline, model)
        )
    expected = (after - before).double()
    figure = digits.increase(model)
    assert figure.value == pytest.approx(float(expected.mean()), abs=1e-6)
    assert figure.error == pytest.approx(float(expected.std() / 7**0.5), rel=1e-3)


def test_takes_what_fits_in_order():
    savings = {"a": 5, "b": 4, "c": 3, "d": 1}
    assert controls.within(["a", "b", "c", "d"], savings, 8) == {"a", "c"}
    assert controls.within(["d", "c", "b", "a"], savings, 8) == {"d", "c", "b"}
    assert controls.within(["a", "b"], savings, 3) == set()


def test_smallest_weights_come_first():
    weights = {"a": torch.tensor([1.0, -9.0]), "b": torch.tensor([0.1, -0.1]), "c": torch.tensor([2.0, 2.0])}
    assert controls.smallest_first(weights, ["a", "b", "c"]) == ["b", "c", "a"]


def test_nearest_format_by_size():
    sizes = {"fp16": 4.2, "int8": 2.2, "int4": 1.1}
    assert [controls.nearest_format(sizes, size) for size in (9.0, 3.3, 1.6, 0.1)] == ["fp16", "fp16", "int4", "int4"]


def test_control_models_are_about_as_large(run, baseline):
    names = [name for name in layer_weights(baseline.state) if "layer5" in name or "layer2" in name]
    chosen = baseline.quantize(names, "int4", pipeline.quantized_metadata(run, baseline, "Ratio", "0.5"))
    smallest, uniform = pipeline.control_models(run, baseline, chosen, Anything())
    assert smallest.model.metadata["label"] == "Smallest weights as Ratio 0.5 (INT4)"
    assert smallest.model.formats != chosen.formats
    smallest_saving = 1e-4  # MiB, of the weights of a GroupNorm
    assert chosen.size_mib() <= smallest.model.size_mib() < 1.1 * chosen.size_mib() + smallest_saving
    assert smallest.size_apart == pytest.approx(smallest.model.size_mib() / chosen.size_mib() - 1)
    nearest = min(("fp16", "int8", "int7", "int6", "int5"), key=lambda fmt: abs(
        size_mib(baseline.config, dict.fromkeys(layer_weights(baseline.state), fmt)) - chosen.size_mib()
    ))  # fmt: skip
    assert uniform.model.metadata["label"] == f"Uniform ({nearest.upper()})" and uniform.size_apart is None


class Anything:
    """Digits with which every model has the same loss."""

    def increase(self, model):
        return held_out.Figure(0.0, 0.0)
