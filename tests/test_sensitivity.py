"""Tensors quantized one at a time: increases of the loss against those measured by hand."""

import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from common.choose.layers import layer_weights
from common.ddpm.schedule import Schedule, denoising_loss
from common.errors import UserError
from common.fisher.information import FisherTable
from common.formats.packed import full_precision
from common.study import increases, predictions, report, sensitivity
from common.study.increases import Increases


def test_each_tensor_is_quantized_alone_and_put_back(tiny_network):
    generator = torch.Generator().manual_seed(0)
    for parameter in tiny_network.parameters():
        if parameter.dim() == 1:  # ones and zeros are exact in every format
            nn.init.normal_(parameter, generator=generator)
    model = full_precision(tiny_network.config, tiny_network.state_dict(), {})
    x0, noise = torch.rand(3, 1, 32, 32, generator=generator), torch.randn(3, 1, 32, 32, generator=generator)
    t = torch.tensor([5, 300, 900])
    names = layer_weights(model.state)
    fisher = {"timestep 1": {name: float(i) for i, name in enumerate(names)}}
    measured = sensitivity.quantize_each_alone(model, "int2", fisher, {}, x0, t, noise)
    assert len(measured.names) == 58 == len(measured.squared_error) == len(measured.mean)
    assert measured.fisher == {"timestep 1": list(map(float, range(58)))} and measured.gauss_newton == {}
    of_layer6 = []
    with torch.no_grad():
        before = denoising_loss(tiny_network, Schedule(), x0, t, noise)
        assert model.state[measured.names[0]].dim() == 1 < model.state[measured.names[1]].dim()
        for i in (0, 1, 30, 57):
            alone = model.quantize([measured.names[i]], "int2", {})
            expected = denoising_loss(alone.network(), Schedule(), x0, t, noise) - before
            assert measured.mean[i] == pytest.approx(float(expected.mean()), abs=1e-6)
            assert measured.error[i] == pytest.approx(float(expected.std() / 3**0.5), abs=1e-6)
            change = alone.state[measured.names[i]] - model.state[measured.names[i]]
            assert measured.squared_error[i] == pytest.approx(float(change.square().sum()), rel=1e-5)
        for name in names:
            if name.startswith("layer6."):
                network = model.quantize([name], "int2", {}).network()
                of_layer6.append(denoising_loss(network, Schedule(), x0, t, noise) - before)
        whole = denoising_loss(model.quantize(names, "int2", {}).network(), Schedule(), x0, t, noise) - before
    mean, error = measured.together
    assert mean == pytest.approx(float(whole.mean()), abs=1e-5)
    assert error == pytest.approx(float(whole.std() / 3**0.5), rel=1e-3)
    of_digit = torch.stack(of_layer6).sum(0).double()
    mean, error = measured.layers["layer6"]
    assert mean == pytest.approx(float(of_digit.mean()), abs=1e-5)
    assert error == pytest.approx(float(of_digit.std() / 3**0.5), rel=1e-3)


def test_rank_correlation_of_known_orders():
    a = np.arange(40.0)
    assert increases.rank_correlation(a, a**3) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert increases.rank_correlation(a, -a) == pytest.approx((-1.0, 0.0), abs=1e-12)
    rho, error = increases.rank_correlation(a, np.random.default_rng(0).normal(size=40))
    assert abs(rho) < 4 * error
    assert error == pytest.approx(1 / 39**0.5, rel=0.25)  # that of independent ranks


def test_tables_name_predictors_and_sum_layers():
    names = ["layer1.a.weight", "layer1.b.weight", "layer2.c.weight"]
    layers = {"layer1": (3e-6, 1e-6), "layer2": (6e-6, 2e-6)}
    fisher = {"timestep 1": [2.0, 1.0, 3.0]}
    measured = [Increases("int4", names, [2e-6, 1e-6, 6e-6], [1.0, 2.0, 3.0], fisher, layers)]
    table = increases.format_layers(measured)
    assert "3.0 ± 1.0" in table.splitlines()[1] and "6.0 ± 2.0" in table.splitlines()[2]
    lines = increases.format_correlations(measured).splitlines()
    assert lines[1].startswith("Fisher, timestep 1 ") and "1.00" in lines[1]
    assert lines[-1].startswith("squared error alone") and "0.50" in lines[-1]


PREDICTED = {
    "error": [0.1, 0.2, 0.3], "together": [7.0, 0.5],
    "fisher": {"timestep 1": [2.0, 1.0, 3.0], "all timesteps": [0.2, 0.4, 0.6]},
    "gauss_newton": {"timestep 1": [1.0, 1.0, 1.0], "all timesteps": [0.5, 2.0, 1.0]},
}  # fmt: skip


def test_predictions_are_values_times_squared_error():
    measured = Increases(**LINE | PREDICTED)
    predicted = measured.predicted()
    assert predicted["Gauss-Newton"].tolist() == [1.5, 2.0, 2.0]
    assert predicted["Fisher / 2"].tolist() == pytest.approx([0.3, 0.2, 0.6])
    header, *lines = increases.format_predictions(measured).splitlines()
    assert header.split()[-4:] == ["Gauss-Newton", "Fisher", "/", "2"] and "int4" in header
    assert lines[0].split() == ["layer1.a.weight", "1,000,000.0", "±", "100,000.0", "1,500,000.00", "300,000.00"]
    assert lines[-1].split()[-5:] == ["7,000,000.0", "±", "500,000.0", "5,500,000.00", "1,100,000.00"]
    assert len(lines) == 4 and lines[-1].startswith("all of them together")
    correlations = increases.format_correlations([measured])
    assert "Gauss-Newton, all timesteps, times squared error" in correlations
    assert Increases(**LINE).predicted() == {}


def test_predictions_are_drawn_against_what_was_measured():
    measured = [Increases(**LINE | PREDICTED), Increases(**LINE | PREDICTED | {"format": "int8", "mean": [1, -2, 3]})]
    axes = predictions.draw_predictions(measured).axes
    for axis, how, xs in zip(axes, ("Gauss-Newton", "Fisher / 2"), ([1.5, 2.0, 2.0], [0.3, 0.2, 0.6]), strict=True):
        assert axis.get_xscale() == axis.get_yscale() == "log" and axis.get_xlabel().endswith(how)
        int4, int8 = axis.containers
        np.testing.assert_allclose(int4.lines[0].get_data(), (xs, [1, 2, 3]))
        np.testing.assert_allclose(int8.lines[0].get_data(), ([xs[0], xs[2]], [1, 3]))
        assert int4.get_label() == "int4: 3 of 3 tensors" and int8.get_label() == "int8: 2 of 3 tensors"
        stars = [line for line in axis.get_lines() if line.get_label() == "int4: together"]
        np.testing.assert_allclose(stars[0].get_data(), ([sum(xs)], [7]))
        (identity,) = (line for line in axis.get_lines() if line.get_label() == "as predicted")
        (x1, y1), (x2, y2) = identity.get_xy1(), identity.get_xy2()
        assert x1 == y1 != x2 == y2
    plt.close("all")


def test_old_files_print_and_have_no_figure(tmp_path):
    path = tmp_path / increases.FILE
    assert predictions.draw_sensitivity(path) is None
    path.write_text(lines())
    assert "together" not in increases.format_sensitivity(path)
    assert predictions.draw_sensitivity(path) is None
    path.write_text(lines()[:-3])
    assert predictions.draw_sensitivity(path) is None


@pytest.mark.parametrize(("name", "preset"), [("quick", "quick"), ("paper-2400", "paper")])
def test_files_of_the_reference_print(name, preset):
    folder = Path(__file__).parents[1] / "reference" / name
    assert f"Preset {preset}" in increases.format_sensitivity(folder / increases.FILE)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / increases.FILE)  # reading it would not end
    with pytest.raises(UserError, match=r"sensitivity\.jsonl: is not a file; move it away"):
        increases.format_sensitivity(tmp_path / increases.FILE)


def test_the_report_draws_it(tmp_path, monkeypatch, capsys):
    written = [HEADER, LINE | PREDICTED]
    (tmp_path / increases.FILE).write_text("".join(json.dumps(line) + "\n" for line in written))
    monkeypatch.setattr(sys, "argv", ["report", "--preset", "quick", "--sensitivity", "--out", str(tmp_path)])
    report.main()
    picture = tmp_path / "figures" / "sensitivity.png"
    printed = capsys.readouterr().out
    assert str(picture) in printed and "all of them together" in printed and picture.stat().st_size > 5_000


HEADER = {"preset": "quick", "baseline": "a" * 64, "data": "mnist5k", "digits": 4, "seed": 0}
LINE = {
    "format": "int4", "names": ["layer1.a.weight", "layer1.b.weight", "layer2.c.weight"], "mean": [1.0, 2.0, 3.0],
    "squared_error": [3.0, 1.0, 2.0], "fisher": {"timestep 1": [2.0, 1.0, 3.0]},
    "layers": {"layer1": [3.0, 1.0], "layer2": [3.0, 1.0]},
}  # fmt: skip


def lines(**changes):
    return "".join(json.dumps(line) + "\n" for line in (HEADER, LINE, LINE | changes))


def predicted(**changes):
    return "".join(json.dumps(line) + "\n" for line in (HEADER, LINE | PREDICTED | changes))


def test_a_whole_file_is_read(tmp_path):
    path = tmp_path / increases.FILE
    path.write_text(lines())
    assert "Preset quick, baseline aaaaaaaa; 4 held-out images" in increases.format_sensitivity(path)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{}\n",
        "no json\n",
        '{"preset": "quick"}\n{"format": "int4"}\n',
        "[]\n",
        "[" * 100_000,
        lines(mean=[1.0, float("nan"), 3.0]),
        lines(mean=[1.0, "2", 3.0]),
        lines(mean=[1.0, 2.0]),
        lines(mean=3),
        lines(format=["int4"]),
        lines(names=[1, 2, 3]),
        lines(fisher=[1.0]),
        lines(fisher={}),
        lines(layers={"layer1": [3.0], "layer2": [3.0, 1.0]}),
        lines(layers={"layer1": 3.0, "layer2": 3.0}),
        predicted(error=[1.0]),
        predicted(together=None),
        predicted(together=[1.0]),
        predicted(together=[1.0, "2"]),
        predicted(gauss_newton={"timestep 1": [1.0, 1.0, 1.0]}),
        predicted(gauss_newton={"all timesteps": [1.0, 1.0]}),
        predicted(gauss_newton=[1.0]),
        predicted(error=None),
        json.dumps([HEADER]) + "\n" + json.dumps(LINE) + "\n",
    ],
)
def test_a_missing_or_damaged_file_is_one_line(tmp_path, content):
    path = tmp_path / increases.FILE
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"measure again|makes it") as error:
        increases.format_sensitivity(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_more_digits_than_there_are_are_refused_before_any_work(tiny_preset, monkeypatch):
    arguments = ["sensitivity", "--preset", "quick", "--device", "cpu", "--digits", "1001"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(UserError, match=r"--digits 1001: there are 1000 held out in mnist5k"):
        sensitivity.main()


def test_a_format_given_twice_is_measured_once(tiny_preset, tiny_network, tmp_path, monkeypatch):
    model, asked = full_precision(tiny_network.config, tiny_network.state_dict(), {"label": "Baseline (FP32)"}), []

    def measured(_, fmt, *__):
        asked.append(fmt)
        return Increases(**LINE | {"format": fmt})

    values, covariance = torch.ones(2, len(model.state)).double(), torch.ones(len(model.state), 1, 1).double()
    table = FisherTable(list(model.state), [1, 5], values, values, covariance, [1, 1], {}, model.sha256, [1.0])
    monkeypatch.setattr("common.study.baselines.load_baseline", lambda run: model)
    monkeypatch.setattr("common.study.diffusion_fisher.fisher_table", lambda *_: table)
    monkeypatch.setattr("common.study.diffusion_fisher.gauss_newton_table", lambda *_: table)
    monkeypatch.setattr(sensitivity, "quantize_each_alone", measured)
    arguments = ["sensitivity", "--preset", "quick", "--device", "cpu", "--digits", "2", "--formats"]
    monkeypatch.setattr(sys, "argv", [*arguments, "int4", "int2", "int4"])
    sensitivity.main()
    assert asked == ["int4", "int2"]
