"""Tensors quantized one at a time: increases of the loss against those measured by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from common.choose.layers import layer_weights
from common.ddpm.schedule import Schedule, denoising_loss
from common.errors import UserError
from common.fisher.information import FisherTable
from common.formats.packed import full_precision
from common.study import sensitivity
from common.study.sensitivity import Increases


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
    measured = sensitivity.quantize_each_alone(model, "int2", fisher, x0, t, noise)
    assert len(measured.names) == 58 == len(measured.squared_error) == len(measured.mean)
    assert measured.fisher == {"timestep 1": list(map(float, range(58)))}
    of_layer6 = []
    with torch.no_grad():
        before = denoising_loss(tiny_network, Schedule(), x0, t, noise)
        assert model.state[measured.names[0]].dim() == 1 < model.state[measured.names[1]].dim()
        for i in (0, 1, 30, 57):
            alone = model.quantize([measured.names[i]], "int2", {})
            expected = (denoising_loss(alone.network(), Schedule(), x0, t, noise) - before).mean()
            assert measured.mean[i] == pytest.approx(float(expected), abs=1e-6)
            change = alone.state[measured.names[i]] - model.state[measured.names[i]]
            assert measured.squared_error[i] == pytest.approx(float(change.square().sum()), rel=1e-5)
        for name in names:
            if name.startswith("layer6."):
                network = model.quantize([name], "int2", {}).network()
                of_layer6.append(denoising_loss(network, Schedule(), x0, t, noise) - before)
    of_digit = torch.stack(of_layer6).sum(0).double()
    mean, error = measured.layers["layer6"]
    assert mean == pytest.approx(float(of_digit.mean()), abs=1e-5)
    assert error == pytest.approx(float(of_digit.std() / 3**0.5), rel=1e-3)


def test_rank_correlation_of_known_orders():
    a = np.arange(40.0)
    assert sensitivity.rank_correlation(a, a**3) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert sensitivity.rank_correlation(a, -a) == pytest.approx((-1.0, 0.0), abs=1e-12)
    rho, error = sensitivity.rank_correlation(a, np.random.default_rng(0).normal(size=40))
    assert abs(rho) < 4 * error
    assert error == pytest.approx(1 / 39**0.5, rel=0.25)  # that of independent ranks


def test_tables_name_predictors_and_sum_layers():
    names = ["layer1.a.weight", "layer1.b.weight", "layer2.c.weight"]
    layers = {"layer1": (3e-6, 1e-6), "layer2": (6e-6, 2e-6)}
    fisher = {"timestep 1": [2.0, 1.0, 3.0]}
    measured = [Increases("int4", names, [2e-6, 1e-6, 6e-6], [1.0, 2.0, 3.0], fisher, layers)]
    table = sensitivity.format_layers(measured)
    assert "3.0 ± 1.0" in table.splitlines()[1] and "6.0 ± 2.0" in table.splitlines()[2]
    lines = sensitivity.format_correlations(measured).splitlines()
    assert lines[1].startswith("Fisher, timestep 1 ") and "1.00" in lines[1]
    assert lines[-1].startswith("squared error alone") and "0.50" in lines[-1]


HEADER = {"preset": "quick", "baseline": "a" * 64, "data": "mnist5k", "digits": 4, "seed": 0}
LINE = {
    "format": "int4", "names": ["layer1.a.weight", "layer1.b.weight", "layer2.c.weight"], "mean": [1.0, 2.0, 3.0],
    "squared_error": [3.0, 1.0, 2.0], "fisher": {"timestep 1": [2.0, 1.0, 3.0]},
    "layers": {"layer1": [3.0, 1.0], "layer2": [3.0, 1.0]},
}  # fmt: skip


def lines(**changes):
    return "".join(json.dumps(line) + "\n" for line in (HEADER, LINE, LINE | changes))


def test_a_whole_file_is_read(tmp_path):
    path = tmp_path / sensitivity.FILE
    path.write_text(lines())
    assert "Preset quick, baseline aaaaaaaa; 4 held-out digits" in sensitivity.format_sensitivity(path)


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
        json.dumps([HEADER]) + "\n" + json.dumps(LINE) + "\n",
    ],
)
def test_a_missing_or_damaged_file_is_one_line(tmp_path, content):
    path = tmp_path / sensitivity.FILE
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"measure again|makes it") as error:
        sensitivity.format_sensitivity(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_more_digits_than_there_are_are_refused_before_any_work(tiny_preset, monkeypatch):
    arguments = ["sensitivity", "--preset", "quick", "--device", "cpu", "--digits", "1001"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(UserError, match=r"--digits 1001: there are 1000 test digits in mnist5k"):
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
    monkeypatch.setattr(sensitivity, "quantize_each_alone", measured)
    arguments = ["sensitivity", "--preset", "quick", "--device", "cpu", "--digits", "2", "--formats"]
    monkeypatch.setattr(sys, "argv", [*arguments, "int4", "int2", "int4"])
    sensitivity.main()
    assert asked == ["int4", "int2"]
