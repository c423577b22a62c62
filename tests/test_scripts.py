"""The scripts and the report, from options to tables, on a network of a few seconds."""

import importlib
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.choose.layers import layer_weights
from common.choose.rules import below_top_ratio
from common.ddpm.sampling import load_images
from common.errors import UserError
from common.fisher import information
from common.formats.packed import load_model
from common.metrics.scores import psnr, squared_errors
from common.study import evaluate, report
from common.study import run as study_run
from common.study.evaluate import Evaluator

STRATEGIES = {
    "whole_threshold": (["--threshold", "0.01", "0.1", "1"], ["Threshold 0.01", "Threshold 0.1", "Threshold 1"]),
    "layer_group": (["--groups", "12/3456", "12/345/6"], ["Groups 12/3456", "Groups 12/345/6"]),
    "layer_ratio": (["--ratio", "0.25", "0.35"], ["Ratio 0.25", "Ratio 0.35"]),
    "layer_math": (["--alpha", "0.5"], ["Math alpha 0.5"]),
}
FIGURES = (
    "fid", "fid_unbiased", "kid", "inception_score", "fid_difference", "fid_unbiased_difference", "kid_difference",
    "psnr", "changed",
)  # fmt: skip


@pytest.fixture
def call(tiny_preset, monkeypatch, capsys):
    """Runs a script's main in an empty folder and returns what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--preset", "quick", "--device", "cpu", *arguments])
        capsys.readouterr()
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def real(tiny_preset):
    """The label of the real digits' row."""
    return f"Real test digits ({tiny_preset.images})"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(call, kept, tmp_path):
    """A folder in which simplediffusion.py has run; it runs once for the whole module, and images are passed on."""
    if (kept / "results").exists():
        shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    else:
        call("simplediffusion")
        shutil.copytree(tmp_path / "checkpoints", kept / "checkpoints")
        shutil.copytree(tmp_path / "results", kept / "results")
    yield tmp_path
    shutil.copytree(tmp_path / "results/quick/images", kept / "results/quick/images", dirs_exist_ok=True)


def rows(out="results/quick"):
    return [json.loads(line) for line in (Path(out) / "results.jsonl").read_text().splitlines()]


def row_of(label, out="results/quick"):
    (row,) = [row for row in rows(out) if row["label"] == label]
    return row


def table_of(printed):
    """{label: line} of the last table with these columns that was printed."""
    lines = printed.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("Model ") and "unbiased FID" in line)
    assert max(map(len, lines[start : start + 3])) <= 120
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("unbiased FID:"))
    return {line.split("  ")[0]: " ".join(line.split()) for line in lines[start + 2 : end] if "±" in line}


def images_of(label, out="results/quick"):
    return load_images(Path(row_of(label, out)["image_file"]))


def assert_printed(line, row):
    for key, digits, factor in [
        ("fid_unbiased", 4, 1), ("fid_unbiased_difference", 4, 1), ("kid_difference", 2, 1000), ("psnr", 1, 1),
    ]:  # fmt: skip
        if key in row or not key.endswith(("difference", "psnr")):
            error = factor * row[key + "_error"]
            while digits and error * 10 ** (digits - 1) >= 9.5:  # two digits of the error are enough
                digits -= 1
            assert f"{factor * row[key]:.{digits}f} ± {error:.{digits}f}" in line


def test_baseline_is_trained_and_then_found(call, real, tmp_path):
    printed = call("simplediffusion")
    checkpoint = tmp_path / "checkpoints" / "quick.safetensors"
    assert "quick (--preset)" in printed.splitlines()[0]
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]  # no state of the training is left
    table = table_of(printed)
    assert list(table) == [real, "Baseline (FP32)", "Uniform (FP16)"]
    assert [row["label"] for row in rows()] == list(table)
    for label, line in table.items():
        assert_printed(line, row_of(label))
    assert "mnist features" in printed and "reference: mnist5k training digits" in printed
    # Every tensor, and a total that is that of the file.
    model = load_model(checkpoint)
    (every,) = Path("results/quick").glob("tensors-*.txt")
    lines = every.read_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*model.state, "total"] and f"each tensor: {every}" in printed
    parameters = f"{sum(t.numel() for t in model.state.values()):,}"
    assert parameters in lines[-1] and f"total {len(model.state):>22} {parameters:>13}" in printed
    third = [tensor.numel() for name, tensor in model.state.items() if name.startswith("layer3.")]
    assert f"\nlayer3 {len(third):>21} {sum(third):>13,} " in printed

    content, table_file = checkpoint.read_bytes(), Path("results/quick/results.jsonl").read_bytes()
    again = call("simplediffusion")
    assert "found trained" in again and "training in" not in again
    assert table_of(again) == table
    for text in (printed, again):
        assert "Median distance to the nearest training digit: generated " in text and "percentage points" in text
    assert checkpoint.read_bytes() == content and Path("results/quick/results.jsonl").read_bytes() == table_file


def test_retraining_ends_in_the_same_weights(call, trained):
    checkpoint = trained / "checkpoints" / "quick.safetensors"
    before = load_model(checkpoint).sha256
    checkpoint.write_bytes(b"damaged")
    call("simplediffusion", "--retrain")
    assert load_model(checkpoint).sha256 == before


def test_training_steps_make_another_training(call, trained):
    call("simplediffusion", "--checkpoint", "short.safetensors", "--retrain", "--training-steps", "3")
    metadata = load_model(Path("short.safetensors")).metadata
    assert metadata["training"]["steps"] == 3 and metadata["digits_seen"] == 3 * 8


def test_learning_curve_scores_what_training_kept(call, real, trained, monkeypatch):
    steps, batch = 12, 8
    before = load_model(Path("checkpoints/quick.safetensors")).sha256
    call("simplediffusion", "--retrain", "--keep-every", "5")
    assert load_model(Path("checkpoints/quick.safetensors")).sha256 == before
    kept = {seen: load_model(Path(f"checkpoints/quick.after-{seen}.safetensors")) for seen in (5 * batch, 10 * batch)}
    assert len(list(Path("checkpoints").iterdir())) == 3
    printed = call("common.study.learning_curve")
    labels = ["FP32 after 40 digits", "FP32 after 80 digits"]
    assert list(table_of(printed)) == [real, "Baseline (FP32)", *labels]
    points = [row_of(label) for label in labels] + [row_of("Baseline (FP32)")]
    assert [p["digits_seen"] for p in points] == [40, 80, steps * batch]
    assert [p["weights"] for p in points] == [kept[40].sha256, kept[80].sha256, before]
    for point in points[:2]:
        assert point["fid_difference"] == pytest.approx(point["fid"] - points[2]["fid"])

    monkeypatch.setattr(sys, "argv", ["report", "--preset", "quick"])
    report.main()
    assert Path("results/quick/figures/learning-curve.png").exists()
    call("simplediffusion", "--checkpoint", "short.safetensors", "--retrain", "--training-steps", "3")
    shutil.copy("short.safetensors", "checkpoints/quick.after-24.safetensors")
    with pytest.raises(UserError, match=r"after-24\.safetensors is of another training"):
        call("common.study.learning_curve")


def test_one_step_lies_in_the_last_quarter_of_the_timesteps(call, trained):
    """A single step of sampling starts at timestep 999: what is quantized there is quantized, elsewhere nothing is."""
    printed = call("common.study.timesteps", "--format", "int2", "--sampler", "ddim", "--steps", "1")
    labels = [f"INT2 at timesteps {first}..{first + 249} alone" for first in (0, 250, 500, 750)]
    assert list(table_of(printed)) == ["Baseline (FP32)", *labels]
    for label in labels[:3]:
        assert row_of(label)["fid_difference"] == 0 and "psnr" not in row_of(label)
    call("simplediffusion", "--format", "int2", "--sampler", "ddim", "--steps", "1")
    last, uniform = row_of(labels[3]), row_of("Uniform (INT2)")
    assert {key: last[key] for key in FIGURES} == {key: uniform[key] for key in FIGURES}


def test_settings_that_differ_in_sign_have_files_of_their_own(call, trained):
    call("layer_math", "--k", "0.5", "-0.5", "--steps", "1")
    one, other = row_of("Math k 0.5 (FP16)"), row_of("Math k -0.5 (FP16)")
    assert one["file"] != other["file"]
    assert all(load_model(Path(row["file"])).sha256 == row["weights"] for row in (one, other))


def test_rows_of_samplers_leave_the_report_whole(call, trained, monkeypatch, capsys):
    def measure_fast(evaluator, model, measure=Evaluator.measure):
        return measure(replace(evaluator, sampling=replace(evaluator.sampling, sampler="ddim", steps=2)), model)

    monkeypatch.setattr(Evaluator, "measure", measure_fast)
    before = row_of("Baseline (FP32)")
    printed = call("benchmarks.samplers", "--ddim", "2", "3", "--dpm", "2")
    assert [line.split(",")[0] for line in printed.splitlines() if "eta 1" in line][-4:] == [
        "ddim 2", "ddim 3", "dpm++ 2", "ddpm 1000",
    ]  # fmt: skip
    (same,) = [r for r in rows() if r["label"] == before["label"] and (r["sampler"], r["steps"]) == ("dpm++", 2)]
    assert Path(same["file"]).name == "quick.safetensors" and same["published"] == before["published"]
    monkeypatch.setattr(sys, "argv", ["report", "--preset", "quick"])
    report.main()
    assert "ddpm 1000 steps" in capsys.readouterr().out


def test_peers_have_rows_or_a_line_of_what_they_cannot(call, trained, monkeypatch):
    from benchmarks import peers

    def halve(network, samples, values):
        with torch.no_grad():
            network.output_conv.weight /= 2
        return network, {"weight": network.output_conv.weight}

    found = {
        "halved": ("torch", halve),
        "none": ("torch", lambda network, *_: (network, {})),
        "gone": ("no-such", halve),
    }
    monkeypatch.setattr(peers, "PEERS", found)
    printed = call("benchmarks.peers")
    assert list(table_of(printed)) == ["Baseline (FP32)", "halved"]
    assert "none: leaves the network as it was" in printed and "gone: is not installed: pip install no-such" in printed
    row = row_of("halved")
    assert 0 < row["file_mib"] < 0.01 and row["fid_difference"] != 0 and row["psnr"] < 60


def test_sensitivity_tables_are_rebuilt_by_the_report(call, trained, monkeypatch, capsys):
    printed = call("common.study.sensitivity", "--digits", "4", "--formats", "int4", "int2")
    monkeypatch.setattr(sys, "argv", ["report", "--preset", "quick", "--sensitivity"])
    report.main()
    tables, figure = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert Path(figure) == Path("results/quick/figures/sensitivity.png") and Path(figure).is_file()
    assert "4 held-out images of mnist5k" in tables and tables in printed
    assert all(f"\nlayer{i} " in tables for i in range(1, 7)) and "squared error alone" in tables


@pytest.mark.parametrize("script", STRATEGIES)
def test_strategy_prints_writes_and_packs_its_rows(call, trained, real, script):
    arguments, settings = STRATEGIES[script]
    printed = call(script, *arguments)
    labels = [f"{setting} (FP16)" for setting in settings]
    table = table_of(printed)
    assert list(table) == [real, "Baseline (FP32)", "Uniform (FP16)", *labels]
    assert {row["label"] for row in rows()} == set(table)
    baseline = row_of("Baseline (FP32)")
    for label in ["Uniform (FP16)", *labels]:
        row = row_of(label)
        assert_printed(table[label], row)
        assert row["fid_difference"] == pytest.approx(row["fid"] - baseline["fid"], abs=1e-9)

        # The size is that of the tensors as stored; the file adds its header.
        model, path = load_model(row["file"]), Path(row["file"])
        assert row["size_mib"] * 2**20 == sum(t.nbytes for t in model.stored.values())
        assert 0 < path.stat().st_size - row["size_mib"] * 2**20 < 64 * 1024
        assert f"{1 - row['file_mib'] / baseline['size_mib']:.2%}" in table[label]

        # Kept tensors: by layer, FP32 in the file, and printed.
        kept = {f"{layer}.{name}.weight" for layer, names in row["kept"].items() for name in names}
        assert kept == {name for name in layer_weights(model.state) if model.formats[name] == "fp32"}
        assert f"{label} keeps {len(kept)} of 58 weights" in printed
        for layer, names in row["kept"].items():
            assert not names or f"  {layer}: {', '.join(names)}" in printed
    assert row_of("Uniform (FP16)")["kept"] == {f"layer{i}": [] for i in range(1, 7)}


def test_threshold_one_keeps_the_largest_alone(call, trained):
    call("whole_threshold", "--threshold", "0", "1")
    assert sum(map(len, row_of("Threshold 1 (FP16)")["kept"].values())) == 1
    nothing = row_of("Threshold 0 (FP16)")
    assert sum(map(len, nothing["kept"].values())) == 58
    for key in ("fid", "size_mib", "weights"):
        assert nothing[key] == row_of("Baseline (FP32)")[key]


@pytest.mark.parametrize("fmt", ["fp16", "int3"])
def test_packed_file_repeats_its_row(call, trained, real, fmt):
    printed = call("layer_ratio", "--ratio", "0.25", "--format", fmt)
    label = f"Ratio 0.25 ({fmt.upper()})"
    before = Path("results/quick/results.jsonl").read_bytes()
    row = row_of(label)

    # In the same folder its images are read back, and the rows stay as they are.
    again = call("simplediffusion", "--checkpoint", row["file"])
    assert list(table_of(again)) == [real, "Baseline (FP32)", label]
    assert table_of(again)[label] == table_of(printed)[label]
    assert Path("results/quick/results.jsonl").read_bytes() == before

    # In another folder they are sampled from the packed file alone.
    shutil.copytree("results/quick/reference", "elsewhere/reference")
    assert_repeated_elsewhere(call, row, printed)
    assert torch.equal(images_of(label), images_of(label, "elsewhere"))


def test_packed_file_that_keeps_everything_repeats_its_row(call, trained):
    printed = call("layer_ratio", "--ratio", "1")
    label = "Ratio 1 (FP16)"
    row = row_of(label)
    shutil.copytree("results/quick/reference", "elsewhere/reference")
    assert_repeated_elsewhere(call, row, printed)


def test_packed_file_whose_output_has_maps_repeats_its_row(call, trained):
    printed = call("layer_budget", "--times", "3")
    row = row_of("Budget 3x (entropy)")
    assert load_model(row["file"]).config.output_bias > 0
    shutil.copytree("results/quick/reference", "elsewhere/reference")
    assert_repeated_elsewhere(call, row, printed)


def assert_repeated_elsewhere(call, row, printed):
    """The packed file of `row` alone gives the same row in another folder."""
    elsewhere = call("simplediffusion", "--checkpoint", row["file"], "--out", "elsewhere")
    assert table_of(elsewhere)[row["label"]] == table_of(printed)[row["label"]]
    repeated = row_of(row["label"], "elsewhere")
    other = {"file", "image_file", "ms_per_step"}
    assert {k: v for k, v in repeated.items() if k not in other} == {k: v for k, v in row.items() if k not in other}


def test_packed_file_without_its_baseline(call, trained, real):
    call("layer_ratio", "--ratio", "0.25")
    row = row_of("Ratio 0.25 (FP16)")
    (trained / "checkpoints" / "quick.safetensors").unlink()
    printed = call("simplediffusion", "--checkpoint", row["file"])
    assert "is not the baseline of" in printed
    assert list(table_of(printed)) == [real, "Ratio 0.25 (FP16)"]
    repeated = row_of("Ratio 0.25 (FP16)")
    assert repeated["fid"] == row["fid"] and repeated["fid_difference"] == row["fid_difference"]  # as it was


def test_quantized_weights_are_what_is_sampled(call, trained):
    formats = ("fp16", "int8", "int4", "int2")
    for fmt in formats:
        call("layer_ratio", "--ratio", "0", "--format", fmt)
    baseline = images_of("Baseline (FP32)")
    psnrs, sizes = [], []
    for fmt in formats:
        uniform = row_of(f"Uniform ({fmt.upper()})")
        psnrs.append(uniform["psnr"])
        sizes.append(uniform["size_mib"])
        # The ratio 0 is the uniform model by another way.
        assert row_of(f"Ratio 0 ({fmt.upper()})")["weights"] == uniform["weights"]
        # What the row says of the images is what they show.
        squared = (images_of(f"Uniform ({fmt.upper()})").double() - baseline.double()).square().mean()
        assert uniform["psnr"] == pytest.approx(10 * math.log10(255**2 / float(squared)), rel=1e-9)
    assert psnrs == sorted(psnrs, reverse=True) and len(set(psnrs)) == 4
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert not torch.equal(images_of("Uniform (INT2)"), baseline)
    assert psnrs[0] > 35 > psnrs[-1]


def test_same_command_prints_the_same_table(call, trained):
    arguments = ("layer_group", "--groups", "12/3456", "--format", "int4")

    def untimed():
        return [{k: v for k, v in row.items() if k != "ms_per_step"} for row in rows() if "INT4" in row["label"]]

    first, lines = call(*arguments), untimed()
    assert call(*arguments) == first  # from what it kept
    shutil.rmtree("results")
    assert table_of(call(*arguments)) == table_of(first)  # from nothing but the checkpoint
    assert untimed() == lines


def test_batch_size_moves_no_figure(call, trained):
    call("simplediffusion", "--format", "int4", "--batch-size", "130")
    call("simplediffusion", "--format", "int4", "--batch-size", "33")
    for label in ("Baseline (FP32)", "Uniform (INT4)"):
        one, other = (r for r in rows() if r["label"] == label and r["batch_size"] in (33, 130))
        assert one["batch_size"] != other["batch_size"]
        for key in ("fid", "kid", "inception_score"):
            assert abs(one[key] - other[key]) <= 0.1 * one[f"{key}_error"], (label, key)


def test_gauss_newton_values_decide_where_they_are_asked_for(call, trained):
    printed = call("layer_ratio", "--ratio", "0.25", "--curvature", "gauss-newton", "--steps", "1")
    label = "Ratio 0.25 (FP16, Gauss-Newton)"
    assert list(table_of(printed))[-1] == label and row_of(label)["curvature"] == "gauss-newton"
    packed = load_model(Path(row_of(label)["file"]))
    assert packed.metadata["curvature"] == "gauss-newton"
    kept = {name for name in layer_weights(packed.state) if packed.formats[name] == "fp32"}
    (path,) = Path("results/quick").glob("gauss-newton-*.safetensors")
    values = information.load(path, packed.metadata["baseline"], "gauss-newton").at(
        "first", layer_weights(packed.state)
    )
    assert kept == set(values) - below_top_ratio(values, 0.25)
    call("layer_ratio", "--ratio", "0.25", "--curvature", "fisher", "--steps", "1")
    assert "curvature" not in row_of("Ratio 0.25 (FP16)")
    assert "curvature" not in load_model(Path(row_of("Ratio 0.25 (FP16)")["file"])).metadata


def test_precision_and_fisher_of_all_timesteps_are_said(call, trained):
    """bfloat16 rounds to 8 bits: its images are near those of FP32, and not the same."""
    printed = call("whole_threshold", "--threshold", "0.1", "--precision", "bf16", "--timestep-weighting", "uniform")
    decibels, _ = psnr(squared_errors(images_of("Baseline (FP32) [bf16]"), images_of("Baseline (FP32)")))
    assert 30 < decibels < 60
    assert row_of("Baseline (FP32) [bf16]")["precision"] == "bf16"
    assert list(table_of(printed))[1:] == [
        "Baseline (FP32) [bf16]", "Uniform (FP16) [bf16]", "Threshold 0.1 (FP16, Fisher over all timesteps) [bf16]",
    ]  # fmt: skip
    assert "sampled in bf16" in printed
    packed = load_model(Path(row_of("Threshold 0.1 (FP16, Fisher over all timesteps) [bf16]")["file"]))
    (path,) = Path("results/quick").glob("fisher-*.safetensors")
    table, names = information.load(path, packed.metadata["baseline"]), layer_weights(packed.state)
    kept, first = ({n for n, f in table.at(w, names).items() if f >= 0.1} for w in ("uniform", "first"))
    assert {name for name in names if packed.formats[name] == "fp32"} == kept != first


def test_results_are_strict_json_even_where_psnr_is_infinite(call, trained, monkeypatch):
    # As it is where the weights differ too little for any pixel to change. JSON knows no infinity.
    monkeypatch.setattr(evaluate, "psnr", lambda *_: (math.inf, 0.0))
    call("whole_threshold", "--threshold", "0", "1")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    for line in Path("results/quick/results.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_report_prints_and_draws_everything(call, trained, real, monkeypatch, capsys):
    for script, (arguments, _) in STRATEGIES.items():
        call(script, *arguments)
    monkeypatch.setattr(sys, "argv", ["report.py", "--preset", "quick"])
    report.main()
    printed = capsys.readouterr().out
    table = table_of(printed)
    assert list(table)[:3] == [real, "Baseline (FP32)", "Uniform (FP16)"]
    assert set(table) == {row["label"] for row in rows()} and len(table) == 3 + 3 + 2 + 2 + 1
    for label, line in table.items():
        assert_printed(line, row_of(label))
    more = [line for line in printed.splitlines() if line.startswith("Ratio 0.25 (FP16)")][1]
    ratio = row_of("Ratio 0.25 (FP16)")
    assert f"{ratio['fid']:.3f}"[:4] in more and f"{ratio['size_mib']:.3f}" in more
    assert "published" not in printed  # which was of the paper's network
    page = Path("results/quick/report.html")
    assert f"all of it on one page: {page}" in printed and "Ratio 0.25 (FP16)" in page.read_text()
    assert "Median distance to the nearest training digit: generated " in printed
    names = ["samples", "fid-size", "fid-ratio"]
    names += [f"{name}-quick" for name in ("weights", "loss", "fisher-tensors", "fisher-groups")]
    expected = {f"{name}.png" for name in names}
    drawn = {p.name for p in Path("results/quick/figures").iterdir()}
    assert drawn == expected
    for name in expected:
        assert str(Path("results/quick/figures") / name) in printed
        picture = Path("results/quick/figures") / name
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5_000


def test_report_as_markdown_has_the_same_cells(call, trained, real, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--preset", "quick", "--markdown"])
    report.main()
    printed = capsys.readouterr().out
    lines = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("| ")]
    header, *cells = [[cell.strip() for cell in line] for line in lines]
    assert header[:4] == ["Model", "unbiased FID", "- FP32", "KID - FP32"] and "FID at N" in header
    assert [line[0] for line in cells] == [real, "Baseline (FP32)", "Uniform (FP16)"]
    for line in cells[1:]:
        assert_printed("  ".join(line), row_of(line[0]))
    assert "features" in printed and "standard error" in printed and "infinitely many images" in printed


def test_the_frontier_is_one_figure(call, trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--preset", "quick", "--frontier"])
    report.main()
    path = Path("results/quick/figures/fid-size.png")
    assert capsys.readouterr().out.split() == [str(path)] and path.stat().st_size > 10_000
    assert list(path.parent.iterdir()) == [path]


def test_seeds_are_pooled(call, trained, monkeypatch):
    for seed in ("0", "1"):
        call("simplediffusion", "--format", "int4", "--seed", seed)
    apart = {r["seed"]: r for r in rows() if r["label"] == "Uniform (INT4)"}
    before = set(Path("results/quick/images").iterdir())
    monkeypatch.setattr("common.ddpm.sampling.sample", lambda *_, **__: pytest.fail("sampled again"))
    printed = call("simplediffusion", "--format", "int4", "--seeds", "2")
    assert "each of seeds 0 to 1" in printed and set(Path("results/quick/images").iterdir()) == before
    real, baseline, pooled = (r for r in rows() if r["seeds"] == 2)
    assert (pooled["label"], pooled["images"], pooled["seed"]) == ("Uniform (INT4)", 260, 0)
    assert real["label"] == "Real test digits (260)" and "fid_unbiased" in real
    assert pooled["image_file"] == apart[0]["image_file"] and baseline["seeds"] == 2
    for key in (key for key in FIGURES if key not in ("psnr", "changed")):
        assert pooled[key] == pytest.approx((apart[0][key] + apart[1][key]) / 2, rel=1e-9)
        # Draws of their own: the variance of their mean is that of each, summed, over 2^2.
        alone = np.hypot(*(row[f"{key}_error"] for row in apart.values())) / 2
        assert pooled[f"{key}_error"] == pytest.approx(alone, rel=0.01)
    assert pooled["changed"] == pytest.approx((apart[0]["changed"] + apart[1]["changed"]) / 2)
    squared = [255**2 / 10 ** (row["psnr"] / 10) for row in apart.values()]
    assert pooled["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean(squared)), rel=1e-9)


def test_seeds_end_at_the_largest(call):
    with pytest.raises(UserError, match="--seeds 3: the last seed would be above 18446744073709551615"):
        call("simplediffusion", "--seed", str(2**64 - 2), "--seeds", "3")


def test_report_keeps_settings_apart(call, trained, monkeypatch, capsys):
    call("simplediffusion", "--seed", "1")
    monkeypatch.setattr("common.study.figures.draw_all", lambda *_, **__: [])  # takes seconds
    monkeypatch.setattr(sys, "argv", ["report.py", "--preset", "quick"])
    report.main()
    printed = capsys.readouterr().out
    assert printed.count("errors: 1 standard error") == 2 and "seed 0" in printed and "seed 1" in printed
    one, other = (r["fid"] for r in rows() if r["label"] == "Baseline (FP32)")
    assert one != other


def test_dry_run_of_the_published_size(call, monkeypatch, capsys, tmp_path):
    # In place of timing the network, which takes seconds.
    monkeypatch.setattr("common.study.run.cost_estimate", lambda run: f"cost of {run.training.steps} steps")
    line = "simplediffusion.py --preset paper --device cpu --dry-run --training-steps 7"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module("simplediffusion").main()
    printed = capsys.readouterr().out
    assert "35,178,689 parameters" in printed and "58 weights" in printed
    assert "cost of 7 steps" in printed
    assert "baseline FP32 134.20 MiB" in printed and "uniform FP16 67.70 MiB (49.55% smaller)" in printed
    assert not list(tmp_path.iterdir())


def test_dry_run_writes_nothing(call, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        call("layer_ratio", "--dry-run", "--format", "int4")
    printed = capsys.readouterr().out
    assert "cost on this device" in printed and "uniform INT4" in printed
    assert not list(tmp_path.iterdir())


def test_too_few_test_digits_for_the_features_leave_their_row_out(call, trained, monkeypatch):
    """As with Inception's 2,048 features and the 1,000 test digits of mnist5k."""
    load = study_run.load_digits
    monkeypatch.setattr(study_run, "load_digits", lambda *which: load(*which)[: 250 if which[1] == "test" else None])
    printed = call("simplediffusion")
    assert "250 test digits in mnist5k are too few" in printed and "--data mnist" in printed
    assert "Real test digits" not in printed and "Baseline (FP32)" in printed


def test_numbers_that_look_alike_have_rows_of_their_own(call, trained):
    call("whole_threshold", "--threshold", "0.1234567", "0.1234568", "--steps", "1")
    one, other = row_of("Threshold 0.1234567 (FP16)"), row_of("Threshold 0.1234568 (FP16)")
    assert (one["setting"], other["setting"]) == ("0.1234567", "0.1234568")


def test_a_packed_file_stays_what_its_row_says_after_another_training(call, trained):
    call("layer_ratio", "--ratio", "0.25", "--steps", "1")
    before = row_of("Ratio 0.25 (FP16)")
    call("simplediffusion", "--retrain", "--training-steps", "3", "--steps", "1")
    call("layer_ratio", "--ratio", "0.25", "--steps", "1")
    of_each = [row for row in rows() if row["label"] == "Ratio 0.25 (FP16)"]
    assert len(of_each) == 2 and before in of_each
    assert all(load_model(Path(row["file"])).sha256 == row["weights"] for row in of_each)
