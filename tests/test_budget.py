"""Budgets: the best choice there is, found by trying all of them; files that keep to their size."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from common import budget, entropy
from common.budget import BudgetError
from common.config import run_main
from common.experiment import preset_checkpoint
from common.fisher import fisher_information
from common.model import MIB, full_precision, load_model, save_model
from common.quantization import stored_bytes


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
        chosen = budget.cheapest_formats(distortion, sizes, limit)
        assert sum(sizes[name][f] for name, f in chosen.items()) <= limit
        assert sum(distortion[name][f] for name, f in chosen.items()) == pytest.approx(best, rel=1e-5)


def test_a_budget_below_the_smallest_choice_says_what_can_be_reached():
    sizes = {"a": {"int2": 10, "fp16": 80}, "b": {"int2": 7, "fp16": 50}}
    with pytest.raises(BudgetError) as error:
        budget.cheapest_formats({name: dict.fromkeys(formats, 1.0) for name, formats in sizes.items()}, sizes, 16)
    assert error.value.smallest == 17
    assert error.value.formats == {"a": "int2", "b": "int2"}


def test_the_tensor_with_the_larger_fisher_value_gets_the_wider_format():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(16, 16, generator=generator) for name in ("dull", "keen")}
    axes = dict.fromkeys(weights, 0)
    limit = stored_bytes(weights["dull"].shape, "int8") + stored_bytes(weights["keen"].shape, "int3")
    formats = budget.fixed_formats(weights, axes, {"dull": 1e-6, "keen": 1.0}, limit)
    assert formats["keen"] == "int8"
    assert budget.fixed_formats(weights, axes, {"dull": 1.0, "keen": 1e-6}, limit)["dull"] == "int8"


def test_steps_follow_the_inverse_root_of_fisher():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(200, 100, generator=generator) for name in ("dull", "keen")}
    limit = 15_000
    stored = budget.entropy_coded(
        weights, {"dull": 1.0, "keen": 16.0}, lambda stored: sum(t.nbytes for t in stored.values()), limit
    )
    assert 0.999 * limit < sum(t.nbytes for t in stored.values()) <= limit
    dull, keen = stored["entropy:steps"].tolist()
    assert dull / keen == pytest.approx(4, rel=1e-5)


def test_entropy_coding_below_the_smallest_says_what_can_be_reached():
    weights = {"w": torch.ones(10, 10)}
    with pytest.raises(BudgetError) as error:
        budget.entropy_coded(weights, {"w": 1.0}, lambda stored: sum(t.nbytes for t in stored.values()), 3)
    smallest = error.value.smallest
    stored = budget.entropy_coded(weights, {"w": 1.0}, lambda stored: sum(t.nbytes for t in stored.values()), smallest)
    assert sum(t.nbytes for t in stored.values()) == smallest


def test_shrink_leaves_what_is_certain_and_pulls_what_is_not():
    values = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1], dtype=torch.float64)
    assert torch.allclose(budget.shrink(values, 1e-6 * values), values, rtol=1e-4)
    shrunk = budget.shrink(values, torch.tensor([1e-6, 1e-5, 1e-4, 0.1], dtype=torch.float64))
    assert torch.allclose(shrunk[:3], values[:3], rtol=1e-3)
    assert values.log().mean().exp() < shrunk[3] < 0.9 * values[3]


def test_shrink_gives_a_tensor_without_gradient_a_value():
    shrunk = budget.shrink(torch.tensor([0.0, 1e-3, 1e-2]).double(), torch.tensor([0.0, 1e-5, 1e-4]).double())
    assert (shrunk > 0).all() and torch.isfinite(shrunk).all()


def test_any_network_can_be_measured_and_stored():
    """Fisher and budget know nothing of this project's network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2)).eval()
    x, y = torch.randn(40, 6), torch.randn(40, 2)
    values, _ = fisher_information(network, lambda net, x, y: (net(x) - y).square().mean(1), (x, y))
    weights = {name: tensor.detach() for name, tensor in network.named_parameters()}
    stored = budget.entropy_coded(weights, values, lambda stored: sum(t.nbytes for t in stored.values()), 250)
    assert sum(t.nbytes for t in stored.values()) <= 250 < 0.25 * sum(w.nbytes for w in weights.values())
    network.load_state_dict(entropy.decode(stored, {name: w.shape for name, w in weights.items()}))


@pytest.fixture
def script(tiny_preset, tiny_network, monkeypatch, tmp_path):
    """Runs layer_budget.py on a baseline of a few thousand parameters; returns its rows of the strategy."""
    import layer_budget

    about = {"label": "Baseline (FP32)", "preset": "quick", "digits_seen": 0, "loss_curve": [1.0] * 50}
    baseline = full_precision(tiny_network.config, tiny_network.state_dict(), about | {"training": {}})
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
    assert rows[0]["psnr"] < rows[-1]["psnr"]


@pytest.mark.parametrize("coding", ["entropy", "fixed"])
def test_a_size_that_cannot_be_reached(script, coding, capfd, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        script("--coding", coding, "--size", "0.0001")
    assert "0.0001 MiB, 104 bytes, cannot be reached" in exit_.value.code and coding in exit_.value.code
    assert not list((tmp_path / "results").rglob("fisher-*"))  # before any work


def test_size_or_times_is_asked_for(script, capfd):
    with pytest.raises(SystemExit) as exit_:
        script()
    assert exit_.value.code == 2
    assert "--size --times" in capfd.readouterr().err


def test_auto_finds_where_the_difference_passes_its_error(monkeypatch, capsys):
    """With models whose FID jumps at a factor that is known."""
    from types import SimpleNamespace

    import layer_budget
    from common import experiment
    from common.metrics import Estimate

    spread = np.array([-1.0, 1.0, -1.0, 1.0])  # a standard error of 0.58

    def measure(run, bench, times):
        fid = Estimate(1.0 + (0.5 if times < 13.7 else 0.7) * (times > 0), spread * (times > 0))
        return SimpleNamespace(scores=SimpleNamespace(fid=fid))

    monkeypatch.setattr(experiment, "measure", measure)
    tried = layer_budget.search(None, None, 0, lambda times: times, 300.0)
    assert tried == sorted(tried)
    within, beyond = max(t for t in tried if t < 13.7), min(t for t in tried if t >= 13.7)
    assert beyond / within <= 1.05
    assert f"standard error of FP32's: {within:g}; the next tried, {beyond:g}, is not" in capsys.readouterr().out


@pytest.mark.parametrize("times", [("auto", "10"), ("0.5",), ("nan",), ("some",)])
def test_times_that_are_none(script, capfd, times):
    with pytest.raises(SystemExit) as exit_:
        script("--times", *times)
    assert exit_.value.code == 2
    assert "argument --times" in capfd.readouterr().err
