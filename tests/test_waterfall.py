"""The parts of layer_budget.py one by one, and rules with their controls, from options to rows and lines."""

import importlib
import sys

import pytest

from common.errors import run_main
from common.formats.packed import MIB, full_precision, load_model, save_model
from common.study import output_bias, pipeline, report
from common.study.rows import ResultStore
from common.study.run import preset_checkpoint

PARTS = (
    ", nearest", ", no feedback", ", by columns", ", no output bias", ", no contrast",
    ", exact inputs", "",
    ", trellis", ", Gauss-Newton", ", unweighted", ", magnitude",
)  # fmt: skip


@pytest.fixture
def call(tiny_preset, tiny_network, monkeypatch, tmp_path):
    """Runs a module's main on a baseline of a few thousand parameters; returns the rows that are kept."""
    metadata = {"label": "Baseline (FP32)", "preset": "quick", "digits_seen": 0, "training": {}}
    baseline = full_precision(tiny_network.config, tiny_network.state_dict(), metadata)
    save_model(preset_checkpoint("quick"), baseline)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, "--preset", "quick", "--device", "cpu", *map(str, arguments)])
        run_main(importlib.import_module(module).main)
        return ResultStore(tmp_path / "results/quick/results.jsonl").rows()

    call.baseline = baseline
    return call


def test_each_part_is_a_row_of_the_same_size(call, capfd, monkeypatch):
    monkeypatch.setattr(output_bias, "MOST_MAPS", 1)
    monkeypatch.setattr(output_bias, "FILE_PER_MAP", 1)
    rows = [row for row in call("common.study.waterfall", "--times", 6) if row.strategy == "Budget"]
    printed = capfd.readouterr().out
    assert [row.label for row in rows] == [f"Budget 6x{part} (entropy)" for part in PARTS]
    limit = int(call.baseline.size_mib() * MIB / 6)
    for row in rows:
        assert 0.98 * limit < row.file_mib * MIB <= limit
        assert f"\n{row.label}: loss x1000 on held-out images " in printed
        assert load_model(row.file).sha256 == row.weights
    assert len({row.weights for row in rows}) == len(PARTS)
    (budget,) = [r for r in call("layer_budget", "--times", 6) if r.label == "Budget 6x (entropy)"]
    assert budget.weights == rows[6].weights and budget.loss_increase == rows[6].loss_increase


def test_a_size_that_cannot_be_reached_is_said_before_any_work(call, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        call("common.study.waterfall", "--times", "500")
    assert "500x" in exit_.value.code and not list((tmp_path / "results").rglob("fisher-*"))


def test_a_rule_and_its_permutations(call, capfd, monkeypatch, tmp_path):
    rows = call("layer_ratio", "--ratio", "0.25", "--format", "int3", "--controls", "4")
    printed = capfd.readouterr().out
    labels = [row.label for row in rows]
    ours = [f"{kind} (INT3)" for kind in (
        "Ratio 0.25", "Permuted 1 as Ratio 0.25", "Permuted 2 as Ratio 0.25", "Smallest weights as Ratio 0.25"
    )]  # fmt: skip
    assert labels[:-1] == ["Real test digits (260)", "Baseline (FP32)", "Uniform (INT3)", *ours]
    assert labels[-1].startswith("Uniform (")
    rule = next(row for row in rows if row.label == ours[0])
    assert rule.place[1] == 4 and rule.size_apart <= 0.01 + 1e-6 and rule.loss_increase is not None
    line = next(line for line in printed.splitlines() if line.startswith("Ratio 0.25 (INT3): loss"))
    assert f"{rule.place[0]} of 4 permutations" in line and f"at most {rule.size_apart:.1%}" in line
    assert any(line.startswith(f"{ours[3]}: loss") and "its size differs by" in line for line in printed.splitlines())
    monkeypatch.setattr(sys, "argv", ["report", "--preset", "quick", "--markdown"])
    report.main()
    assert line in capfd.readouterr().out.splitlines()
    again = call("layer_ratio", "--ratio", "0.25", "--format", "int3")  # without: the place is not lost
    assert next(row for row in again if row.label == ours[0]).place == rule.place


@pytest.mark.parametrize("rounding", ["least-error", "feedback"])
def test_uniform_models_rounded_with_care(call, rounding, monkeypatch):
    rows = {row.label: row for row in call("simplediffusion", "--format", "int3", "--rounding", rounding)}
    row = rows[f"Uniform (INT3, {rounding.replace('-', ' ')})"]
    rows = {row.label: row for row in call("simplediffusion", "--format", "int3")}
    plain = rows["Uniform (INT3)"]
    assert row.rounding == rounding and plain.rounding is None
    of_a_map = 1024 + 4 + 20 * 2  # its codes, its scale and its part of the mixture
    more = of_a_map + 20 * 2 if rounding == "feedback" else 0  # and the contrast
    assert row.size_mib * MIB == pytest.approx(plain.size_mib * MIB + more)
    assert row.weights != plain.weights and load_model(row.file).sha256 == row.weights
    errors = [
        sum(float((load_model(r.file).state[n] - w).square().sum()) for n, w in call.baseline.state.items())
        for r in (row, plain)
    ]
    assert rounding == "feedback" or errors[0] < errors[1]
    monkeypatch.setattr(pipeline, "rounding_feedback", lambda run, baseline: {})
    again = {row.label: row for row in call("simplediffusion", "--format", "int3", "--rounding", rounding)}
    assert (again[row.label].weights == row.weights) == (rounding != "feedback")


def test_rounding_goes_with_integers(call, capfd):
    with pytest.raises(SystemExit) as exit_:
        call("simplediffusion", "--rounding", "feedback")
    assert exit_.value.code == 2 and "argument --rounding feedback: goes with --format int8" in capfd.readouterr().err
