"""Budgets: the best choice there is, found by trying all of them; files that keep to their size."""

import itertools
import json
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from common.choose import allocation, rounding
from common.choose.allocation import BudgetError
from common.choose.feedback import ROW_DAMPING, factorize_rows, measure_feedback, no_feedback
from common.choose.fixed_rounding import FixedRounding
from common.ddpm.schedule import Schedule
from common.errors import UserError, run_main
from common.fisher.information import fisher_information
from common.formats import entropy
from common.formats.numbers import stored_bytes
from common.formats.packed import MIB, file_bytes, full_precision, load_model, save_model, tensor_shapes
from common.metrics.estimate import Estimate
from common.study import budget_models, budget_search
from common.study import finetuned as finetuned_module
from common.study.codings import EntropyCoding, FixedWidths, in_formats, make_in_turn
from common.study.rows import Figure
from common.study.run import preset_checkpoint
from common.training.finetune_inputs import BATCH, STATES, STEPS


def test_cheapest_formats_are_those_of_trying_every_choice():
    rng = np.random.default_rng(0)
    for _ in range(5):
        sizes = {f"t{i}": {f: int(s) for f, s in zip("abcd", rng.integers(1, 50, 4), strict=True)} for i in range(5)}
        # Over many powers of ten, as those of formats from 2 to 32 bits are.
        distortion = {name: {f: float(10 ** rng.uniform(-12, 0)) for f in formats} for name, formats in sizes.items()}
        limit = 90
        best = min(
            sum(distortion[name][f] for name, f in zip(sizes, choice, strict=True))
            for choice in itertools.product("abcd", repeat=5)
            if sum(sizes[name][f] for name, f in zip(sizes, choice, strict=True)) <= limit
        )
        chosen = allocation.cheapest_formats(distortion, sizes, limit)
        assert sum(sizes[name][f] for name, f in chosen.items()) <= limit
        assert sum(distortion[name][f] for name, f in chosen.items()) == pytest.approx(best, rel=1e-5)


def test_a_budget_below_the_smallest_choice_says_what_can_be_reached():
    sizes = {"a": {"int2": 10, "fp16": 80}, "b": {"int2": 7, "fp16": 50}}
    with pytest.raises(BudgetError) as error:
        allocation.cheapest_formats({name: dict.fromkeys(formats, 1.0) for name, formats in sizes.items()}, sizes, 16)
    assert error.value.smallest == 17
    assert error.value.formats == {"a": "int2", "b": "int2"}


def test_the_tensor_with_the_larger_fisher_value_gets_the_wider_format():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(16, 16, generator=generator) for name in ("dull", "keen")}
    axes = dict.fromkeys(weights, 0)
    limit = stored_bytes(weights["dull"].shape, "int8") + stored_bytes(weights["keen"].shape, "int3")
    formats = allocation.fixed_formats(weights, axes, {"dull": 1e-6, "keen": 1.0}, limit)
    assert formats["keen"] == "int8"
    assert allocation.fixed_formats(weights, axes, {"dull": 1.0, "keen": 1e-6}, limit)["dull"] == "int8"


def test_steps_follow_the_inverse_root_of_fisher():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(200, 100, generator=generator) for name in ("dull", "keen")}
    limit = 15_000
    stored = allocation.entropy_coded(weights, {"dull": 1.0, "keen": 16.0}, nbytes, limit)
    assert 0.999 * limit < nbytes(stored) <= limit
    dull, keen = stored["entropy:steps"].tolist()
    assert dull / keen == pytest.approx(4, rel=1e-5)


def test_entropy_coding_below_the_smallest_says_what_can_be_reached():
    weights = {"w": torch.ones(10, 10)}
    with pytest.raises(BudgetError) as error:
        allocation.entropy_coded(weights, {"w": 1.0}, nbytes, 3)
    smallest = error.value.smallest
    stored = allocation.entropy_coded(weights, {"w": 1.0}, nbytes, smallest)
    assert nbytes(stored) == smallest


def test_a_budget_error_is_the_same_in_another_process():
    error = pickle.loads(pickle.dumps(BudgetError(12_345, {"a": "int2"})))
    assert (error.smallest, error.formats, str(error)) == (
        12_345,
        {"a": "int2"},
        "the smallest possible is 12345 bytes",
    )


def test_shrink_leaves_what_is_certain_and_pulls_what_is_not():
    values = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1], dtype=torch.float64)
    assert torch.allclose(allocation.shrink(values, 1e-6 * values), values, rtol=1e-4)
    shrunk = allocation.shrink(values, torch.tensor([1e-6, 1e-5, 1e-4, 0.1], dtype=torch.float64))
    assert torch.allclose(shrunk[:3], values[:3], rtol=1e-3)
    # Logarithms lie ln 10 apart, so their variance is 5/3 of its square, 8.8365; the errors explain 0.250075, the mean
    # of 1e-4 three times and 1. Of 1.5 ln 10, its distance to the mean, the last keeps 8.5864 of 8.5864 + 1.
    assert float(shrunk[3]) == pytest.approx(10 ** (-2.5 + 1.5 * 8.58643 / 9.58643), rel=1e-5)


def test_shrink_gives_a_tensor_without_gradient_a_value():
    shrunk = allocation.shrink(torch.tensor([0.0, 1e-3, 1e-2]).double(), torch.tensor([0.0, 1e-5, 1e-4]).double())
    assert (shrunk > 0).all() and torch.isfinite(shrunk).all()


def test_values_that_are_all_zero_or_not_finite_are_said_in_one_line():
    values, bad = torch.tensor([1e-3, 1e-2]).double(), torch.tensor([1e-3, torch.nan]).double()
    with pytest.raises(UserError, match="all Fisher values are zero"):
        allocation.shrink(0 * values, 0 * values)
    for measured in ((bad, values), (values, bad)):
        with pytest.raises(UserError, match="not finite"):
            allocation.shrink(*measured)
    weights = {"w": torch.ones(4, 4)}
    for value in (torch.nan, torch.inf, -1.0):
        with pytest.raises(UserError, match="the Fisher value of w is"):
            allocation.entropy_coded(weights, {"w": value}, nbytes, 10_000)
        with pytest.raises(UserError, match="the Fisher value of w is"):
            allocation.fixed_formats(weights, {"w": 0}, {"w": value}, 10_000)


def test_weights_that_the_loss_does_not_reach_become_zero():
    weights = {"w": torch.ones(4, 4)}
    stored = allocation.entropy_coded(weights, {"w": 0.0}, nbytes, 10_000)
    assert torch.equal(entropy.decode(stored, {"w": weights["w"].shape})["w"], torch.zeros(4, 4))


def test_one_tensor_alone_is_not_shrunk():
    value = torch.tensor([1e-3]).double()
    assert torch.equal(allocation.shrink(value, value), value)


def test_bfloat16_weights_are_stored_like_the_same_weights_in_fp32():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).bfloat16()
    x = torch.randn(20, 8).bfloat16()
    feedback = measure_feedback(network, lambda call, x: call(x).square().sum(1), (x,))
    weights = {name: w.detach() for name, w in network.named_parameters()}
    wide = {name: w.float() for name, w in weights.items()}
    values, axes = dict.fromkeys(weights, 1.0), dict.fromkeys(weights, 0)
    stored, expected = (allocation.entropy_coded(w, values, nbytes, 200, feedback) for w in (weights, wide))
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
    assert allocation.fixed_formats(weights, axes, values, 400) == allocation.fixed_formats(wide, axes, values, 400)


def test_any_network_can_be_measured_and_stored():
    """Fisher information and budget know nothing of this project's network."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x, noise, t = torch.randn(6, 1, 16, 16), torch.randn(6, 1, 16, 16), torch.tensor([1, 5, 100, 300, 700, 999])

    def loss(call, x, noise, t):
        return (call(x, t).sample - noise).square().flatten(1).mean(1)

    feedback = measure_feedback(network, loss, (x, noise, t))
    values, errors = (
        torch.tensor(list(v.values())).double() for v in fisher_information(network, loss, (x, noise, t), chunk=3)
    )
    weights = {name: tensor.detach() for name, tensor in network.named_parameters()}
    assert len(feedback) > 20 and feedback.keys() < weights.keys()
    limit = sum(w.nbytes for w in weights.values()) // 8
    expected = network(x, t).sample.detach()
    stored = allocation.entropy_coded(
        weights, dict(zip(weights, allocation.shrink(values, errors).tolist(), strict=True)), nbytes, limit, feedback
    )
    assert nbytes(stored) <= limit
    network.load_state_dict(entropy.decode(stored, {name: w.shape for name, w in weights.items()}))
    error = network(x, t).sample.detach() - expected
    assert 0 < error.norm() < 0.3 * expected.norm()


def nbytes(stored):
    return sum(tensor.nbytes for tensor in stored.values())


def test_fill_takes_the_lowest_price_that_fits():
    weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    steps = {"w": 0.3}
    whole = nbytes(rounding.encode(weights, steps, price=0.0))
    shapes = {"w": weights["w"].shape}
    assert torch.equal(
        entropy.decode(allocation.requantize_to_size(weights, steps, nbytes, whole), shapes)["w"],
        (weights["w"] / 0.3).round() * 0.3,
    )
    for share in (0.98, 0.95):
        limit = int(share * whole)
        assert 0.97 * limit < nbytes(allocation.requantize_to_size(weights, steps, nbytes, limit)) <= limit
    with pytest.raises(BudgetError):
        allocation.requantize_to_size(weights, steps, nbytes, 3)


def test_fill_takes_larger_steps_where_no_price_fits():
    weights = {name: torch.randn(100, 100, generator=torch.Generator().manual_seed(0)) for name in "ab"}
    steps = {"a": 0.01, "b": 0.02}
    priced = nbytes(rounding.encode(weights, steps, price=1e3))
    for limit in (priced - 1, priced // 2, 500):
        stored = allocation.requantize_to_size(weights, steps, nbytes, limit)
        assert 0.95 * limit < nbytes(stored) <= limit
        a, b = stored["entropy:steps"].tolist()
        assert a > 0.01 and b / a == pytest.approx(2)


@pytest.fixture
def script(tiny_preset, tiny_network, monkeypatch, tmp_path):
    """Runs layer_budget.py on a baseline of a few thousand parameters; returns its rows of the strategy."""
    import layer_budget

    metadata = {"label": "Baseline (FP32)", "preset": "quick", "digits_seen": 0, "loss_curve": [1.0] * 50}
    baseline = full_precision(tiny_network.config, tiny_network.state_dict(), metadata | {"training": {}})
    save_model(preset_checkpoint("quick"), baseline)

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["layer_budget.py", "--preset", "quick", "--device", "cpu", *map(str, arguments)]
        )
        run_main(layer_budget.main)
        rows = [json.loads(line) for line in (tmp_path / "results/quick/results.jsonl").read_text().splitlines()]
        return [row for row in rows if row.get("strategy") == "Budget"]

    run.baseline = baseline
    return run


@pytest.mark.parametrize("coding", ["entropy", "fixed"])
def test_the_file_keeps_to_its_size_and_repeats_its_weights(script, coding):
    times = (4, 2.5, 1.5, 1)
    rows = script("--coding", coding, "--times", *times)
    assert len(rows) == len(times)
    for row, factor in zip(rows, times, strict=True):
        limit = int(script.baseline.size_mib() * MIB / factor)
        assert row["file_mib"] * MIB <= limit
        assert row["size_mib"] <= row["file_mib"]
        assert load_model(row["file"]).sha256 == row["weights"]
        assert coding in row["label"]
    assert rows[0]["psnr"] < rows[1]["psnr"]  # at 1x the images are the same, and there is none


@pytest.mark.parametrize("coding", ["entropy", "fixed"])
def test_twenty_sizes_from_the_smallest_to_fp32_are_kept_to(tiny_network, coding, tmp_path):
    baseline = full_precision(tiny_network.config, tiny_network.state_dict(), {})
    allocator = {"entropy": EntropyCoding(baseline, {}), "fixed": FixedWidths(baseline)}[coding]
    least, most = allocator.smallest({}), int(baseline.size_mib() * MIB)
    values = dict.fromkeys(baseline.state, 1.0)
    errors = []
    for limit in np.geomspace(least, most, 20).astype(int).tolist():
        model = allocator.fit(limit, values, {})
        save_model(tmp_path / "model", model)
        assert (tmp_path / "model").stat().st_size == file_bytes(model) <= limit
        errors.append(sum(float((model.state[n] - w).square().sum()) for n, w in baseline.state.items()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]


def test_layers_rounded_in_turn_keep_to_sizes_from_the_smallest_to_fp32(tiny_network, capsys, monkeypatch):
    baseline = full_precision(tiny_network.config, tiny_network.state_dict(), {})
    layers = {n: m for n, m in tiny_network.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    feedback = {f"{name}.weight": no_feedback(layer.weight.shape) for name, layer in layers.items()}
    inputs = (torch.randn(4, 1, 32, 32), torch.tensor([10, 200, 500, 900]))
    coding = EntropyCoding(baseline, feedback, inputs=inputs)
    least, most = coding.smallest({"label": "m"}), int(baseline.size_mib() * MIB)
    for limit in np.geomspace(least, most, 3).astype(int).tolist():
        model = coding.fit(limit, dict.fromkeys(baseline.state, 1.0), {"label": "m"})
        assert file_bytes(model) <= limit and all(w.isfinite().all() for w in model.state.values())
    assert "did not fit" not in capsys.readouterr().err
    monkeypatch.setattr(allocation, "fit_again", lambda *_: None)
    model = coding.fit(limit, dict.fromkeys(baseline.state, 1.0), {"label": "m"})
    assert "m: it did not fit layer after layer" in "".join(capsys.readouterr())
    assert model.sha256 == replace(coding, inputs=None).fit(limit, dict.fromkeys(baseline.state, 1.0), {}).sha256


def test_fixed_widths_rounded_in_turn_have_outputs_nearer_to_the_exact_ones(tiny_network):
    baseline = full_precision(tiny_network.config, tiny_network.state_dict(), {})
    layers = {n: m for n, m in tiny_network.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    feedback = {f"{name}.weight": no_feedback(layer.weight.shape) for name, layer in layers.items()}
    formats = {name: "int3" if weight.dim() > 1 else "fp16" for name, weight in baseline.state.items()}
    formats["late_conv.weight"] = "fp32"
    by = FixedRounding("feedback", feedback)

    def make(source):
        return in_formats(source, formats, {"label": "m"}, by.quantize)

    def inputs(seed):
        return torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(seed)), torch.arange(0, 960, 15)

    plain, in_turn = (make_in_turn(baseline, make, by, of) for of in (None, inputs(0)))
    assert in_turn.formats == plain.formats == make(baseline).formats and in_turn.metadata == plain.metadata
    assert file_bytes(in_turn) == file_bytes(plain) and plain.sha256 == make(baseline).sha256
    assert torch.equal(in_turn.state["shallow_conv.weight"], plain.state["shallow_conv.weight"])  # its inputs are exact
    assert not torch.equal(in_turn.state["late_conv.weight"], baseline.state["late_conv.weight"])  # in FP32 as well
    with torch.inference_mode():
        exact, found, before = (model.network()(*inputs(1)) for model in (baseline, in_turn, plain))
    assert (found - exact).square().mean() < 0.5 * (before - exact).square().mean()


def test_a_second_fit_keeps_to_the_budget_or_finds_none():
    def encode(factor):
        return {"codes": torch.zeros(int(1000 * factor**-0.7), dtype=torch.uint8)}

    for budget in (970, 1000, 1030):
        assert 0.99 * budget < nbytes(allocation.fit_again(encode, nbytes, budget)) <= budget
    assert allocation.fit_again(lambda factor: encode(0.1), nbytes, 1000) is None


def test_steps_of_channels_follow_the_second_moments_of_their_gradients(tiny_network):
    baseline = full_precision(tiny_network.config, tiny_network.state_dict(), {})
    names = [name for name, (shape, axis) in tensor_shapes(baseline.config).items() if len(shape) == 4 and axis == 1]
    rows = tensor_shapes(baseline.config)[names[0]][0][1]
    scale = torch.linspace(1, 3, rows).double()
    feedback = no_feedback(baseline.state[names[0]].shape, transposed=True)
    feedback = replace(feedback, by_rows=factorize_rows(scale.diag().square()))
    coding = EntropyCoding(baseline, {names[0]: feedback}, by_rows=True)
    model = coding.fit(int(baseline.size_mib() * MIB / 6), dict.fromkeys(baseline.state, 1.0), {})
    steps = entropy.steps_of(model.stored, {name: w.shape for name, w in baseline.state.items()})
    moments = (scale.square() / scale.square().mean()).numpy() + ROW_DAMPING
    found = steps[names[0]].ravel() * moments**0.5
    assert found == pytest.approx(np.full(rows, found[0]), rel=2 ** (1 / 32) - 1)
    assert {np.ndim(step) for step in steps.values()} == {0, 2, 4}
    assert all(np.ptp(step) == 0 for name, step in steps.items() if name != names[0])


def test_other_values_are_none_or_those_of_the_weights():
    weights = {"a": torch.tensor([1.0, -3.0]), "b": torch.zeros(2), "c": torch.ones(2)}
    others = budget_models.other_values(weights, {"a": 1.0, "b": 2.0, "c": 3.0})
    assert others == {"unweighted": {"a": 1.0, "b": 1.0, "c": 1.0}, "magnitude": {"a": 5.0, "b": 1e-30, "c": 1.0}}


@pytest.mark.parametrize("coding", ["entropy", "fixed"])
def test_a_size_that_cannot_be_reached(script, coding, capfd, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        script("--coding", coding, "--size", "0.0001")
    assert "0.0001 MiB, 104 bytes, cannot be reached" in exit_.value.code and coding in exit_.value.code
    assert not list((tmp_path / "results").rglob("fisher-*"))  # before any work


def test_a_network_of_more_weights_than_files_may_stand_for(script, monkeypatch):
    monkeypatch.setattr(budget_models, "MOST_CODED_WEIGHTS", 10_000)
    with pytest.raises(SystemExit) as exit_:
        script("--times", "8")
    assert "--coding entropy: the network has" in exit_.value.code and "--coding fixed" in exit_.value.code


def test_a_finetuned_row_keeps_to_the_size_of_its_own(script):
    plain, trained = script("--times", "9", "--finetune", "3")
    assert trained["label"] == "Budget 9x, 3 updates (entropy)" and plain["label"] == "Budget 9x (entropy)"
    assert trained["file_mib"] * MIB <= int(script.baseline.size_mib() * MIB / 9)
    assert load_model(trained["file"]).sha256 == trained["weights"] != plain["weights"]


def test_finetuning_learns_from_noised_digits_and_states_and_is_kept(script, monkeypatch):
    drawn, original = [], finetuned_module.finetune
    with monkeypatch.context() as patch:
        patch.setattr(finetuned_module, "finetune", lambda *a: drawn.append(a[3](0)) or original(*a))
        _, trained = script("--times", "9", "--finetune", "3")
    ((x, t, outputs),) = drawn
    met = set(Schedule().spaced_timesteps(STEPS))
    assert len(x) == len(outputs) == BATCH and set(t[-STATES:].tolist()) <= met
    assert not set(t[:-STATES].tolist()) <= met
    monkeypatch.setattr(finetuned_module, "finetune", lambda *_: pytest.fail("made anew"))
    _, again = script("--times", "9", "--finetune", "3")
    assert again["weights"] == trained["weights"]


def test_finetuning_starts_from_a_larger_file_where_its_updates_can_shrink_that(script, monkeypatch):
    started, versions = [], set()

    def take(run, baseline, model, metadata, limit, updates):
        started.append((updates, file_bytes(model) / limit))
        versions.add(entropy.version_of(model.stored))
        raise BudgetError(limit + 1)

    monkeypatch.setattr(budget_models, "finetuned", take)
    for updates in (599, 600):
        script("--times", "9", "--finetune", str(updates))
    (_, few), (_, many) = started
    assert 0.9 < few < 1 < many <= 1.21
    assert versions == {3}  # channels have steps of their own


def test_finetuned_codes_that_do_not_fit_cost_no_other_row(script, monkeypatch, capfd):
    def too_large(*_):
        raise BudgetError(12_345)

    monkeypatch.setattr(budget_models, "finetuned", too_large)
    (row,) = script("--times", "9", "--finetune", "3")
    assert row["label"] == "Budget 9x (entropy)" and "12,345 bytes" in capfd.readouterr().out


def test_controls_are_of_the_same_size(script, capfd):
    rows = script("--times", "6", "--controls", "3")
    kinds = ("", ", permuted 1", ", permuted 2", ", unweighted", ", magnitude")
    assert [row["label"] for row in rows] == [f"Budget 6x{kind} (entropy)" for kind in kinds]
    limit = int(script.baseline.size_mib() * MIB / 6)
    assert all(0.98 * limit < row["file_mib"] * MIB <= limit for row in rows)
    lower, draws = rows[0]["place"]
    assert 0 <= lower <= draws == 3 and rows[0]["size_apart"] < 0.02
    assert all("place" not in row and "loss_increase" in row for row in rows[1:])
    assert lower >= sum(row["loss_increase"] <= rows[0]["loss_increase"] for row in rows[1:3])
    said = f"{lower} of 3 permutations of its Fisher values do as well or better (p = {(lower + 1) / 4:.2g})"
    assert said in capfd.readouterr().out


def test_fixed_widths_are_rounded_with_care_unless_asked_otherwise(script, monkeypatch):
    (careful,) = script("--coding", "fixed", "--times", "4")
    assert careful["label"] == "Budget 4x (fixed, feedback)" and careful["rounding"] == "feedback"
    rows = script("--coding", "fixed", "--times", "4", "--rounding", "nearest")
    assert rows[1]["label"] == "Budget 4x (fixed)" and "rounding" not in rows[1]
    assert rows[0]["weights"] != rows[1]["weights"]
    assert load_model(careful["file"]).metadata["rounding"] == "feedback"
    weights = {careful["weights"]}
    for measured, nothing in (("rounding_feedback", {}), ("rounding_inputs", None)):
        with monkeypatch.context() as patched:
            patched.setattr(budget_models, measured, lambda run, baseline, nothing=nothing: nothing)
            *_, without = (
                row for row in script("--coding", "fixed", "--times", "4") if row["label"] == careful["label"]
            )
        weights.add(without["weights"])
    assert len(weights) == 3


def test_rounding_of_integers_goes_with_fixed_widths(script, capfd):
    with pytest.raises(SystemExit) as exit_:
        script("--times", "9", "--rounding", "feedback")
    assert exit_.value.code == 2 and "argument --rounding: goes with --coding fixed" in capfd.readouterr().err


def test_finetuning_goes_with_entropy_coding(script, capfd):
    with pytest.raises(SystemExit) as exit_:
        script("--times", "9", "--coding", "fixed", "--finetune", "3")
    assert exit_.value.code == 2
    assert "argument --finetune" in capfd.readouterr().err


def test_auto_tries_finetuned_models_where_finetuning_is_asked_for(script, monkeypatch):
    starts = []

    def search(acceptable, most, start):
        starts.append(start)
        return (9.0 if acceptable(9) else None), None

    monkeypatch.setattr(budget_models, "search", search)
    (row,) = script("--times", "auto", "--finetune", "3")
    assert starts == [budget_search.START_FINETUNED]
    assert row["label"] == "Budget 9x, 3 updates (entropy)"


def test_a_factor_is_accepted_where_its_upper_bound_lies_below_the_margin():
    spread = np.array([-1.0, 1.0] * 50)  # an error of 0.1005
    assert budget_search.margin_of(Estimate(2.0, spread), 0.25) == 0.5
    error = Estimate(0.0, spread).error
    for value in (error / 2, 0.0, -3.0):  # the baseline is as good as can be told: a margin all the same
        assert budget_search.margin_of(Estimate(value, spread), 0.25) == pytest.approx(0.25 * error) and error > 0.1
    for value, error, accepted in ((0.3, 0.09, True), (0.3, 0.11, False), (-1.0, 0.8, False), (0.49, 0.0, True)):
        assert budget_search.lies_below(Figure(value, error), 0.5) is accepted


@pytest.mark.parametrize(("margin", "holds"), [(1000.0, "holds there too"), (-1.0, "does not hold there")])
def test_auto_confirms_on_noise_of_its_own(script, monkeypatch, capfd, margin, holds):
    found = []
    monkeypatch.setattr(
        budget_models, "search", lambda acceptable, most, start: (found.append(acceptable(9)) or 9.0, None)
    )
    monkeypatch.setattr(budget_models, "margin_of", lambda reference, share: margin * share)
    (row,) = script("--times", "auto", "--margin", "1", "--seed", "3", "--seeds", "2")
    assert (row["label"], row["seed"], row["seeds"]) == ("Budget 9x (entropy)", 3, 2)
    assert found == [row["fid_unbiased_difference"] + 2 * row["fid_unbiased_difference_error"] < margin]
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "took no part" in line]
    assert "in the search, seeds 5 to 6: 9 costs " in line and f"margin {margin:.4f}; it {holds}" in line
    shown = f"{row['fid_unbiased_difference']:.4f} ± {row['fid_unbiased_difference_error']:.4f}"
    assert shown not in line  # measured anew


def test_margin_goes_with_auto(script, capfd):
    with pytest.raises(SystemExit) as exit_:
        script("--times", "9", "--margin", "0.1")
    assert exit_.value.code == 2 and "argument --margin" in capfd.readouterr().err


def test_size_or_times_is_asked_for(script, capfd):
    with pytest.raises(SystemExit) as exit_:
        script()
    assert exit_.value.code == 2
    assert "--size --times" in capfd.readouterr().err


@pytest.mark.parametrize("jump", [13.7, 16.3, 31.0, 1.2])
def test_search_finds_where_models_cease_to_be_acceptable(jump):
    tried = []
    within, beyond = budget_search.search(lambda times: tried.append(times) or times < jump, 300.0)
    assert within in tried and beyond in tried and within < jump <= beyond
    assert 1 < beyond / within <= 1.06
    said = budget_search.describe_search(within, beyond, tried, 0.02)
    assert "margin of 0.0200" in said and f": {within:g}; the next tried, {beyond:g}, may cost more" in said


def test_a_tensor_that_the_loss_does_not_reach_costs_nothing():
    weights = {"used": torch.linspace(-1, 1, 200).reshape(20, 10), "unused": torch.linspace(-1, 1, 200).reshape(20, 10)}
    stored = allocation.entropy_coded(
        weights, {"used": 1.0, "unused": 0.0}, lambda s: sum(t.nbytes for t in s.values()), 150
    )
    found = entropy.decode(stored, {name: w.shape for name, w in weights.items()})
    assert not found["unused"].any() and (found["used"] - weights["used"]).abs().max() < 0.2


def test_search_stops_where_there_is_nothing_smaller_or_nothing_acceptable():
    tried = []
    assert budget_search.search(lambda times: tried.append(times) or True, 24.96) == (24.9, None)
    assert tried == [16.0, 20.0, 24.9]
    assert ": 24.9; nothing larger was tried" in budget_search.describe_search(24.9, None, tried, 0.02)
    tried = []
    assert budget_search.search(lambda times: tried.append(times) or False, 1.5) == (None, 1.2)
    assert tried == [1.5, 1.2]
    said = budget_search.describe_search(None, 1.2, tried, 0.02)
    assert "no factor that was tried, 1.2, 1.5, costs less" in said
    budget_search.search(lambda times: tried.append(times) or times < 14.8, 14.853)
    assert max(tried) <= 14.853


@pytest.mark.parametrize("times", [("auto", "10"), ("0.5",), ("nan",), ("some",)])
def test_times_that_are_none(script, capfd, times):
    with pytest.raises(SystemExit) as exit_:
        script("--times", *times)
    assert exit_.value.code == 2
    assert "argument --times" in capfd.readouterr().err
