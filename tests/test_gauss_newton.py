"""Gauss-Newton values against closed forms, explicit Jacobians and increases of the loss that were measured."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from common.choose.allocation import shrink
from common.ddpm.digits import to_model_range
from common.ddpm.schedule import Schedule
from common.errors import UserError
from common.fisher.gauss_newton import gauss_newton, random_signs
from common.formats.packed import full_precision
from common.options import strategy_parser
from common.runtime.sealed import CheckpointError
from common.study import diffusion_fisher
from common.study.budget_models import budget_metadata, tensor_values
from common.study.pipeline import quantized_metadata
from common.study.run import start


def output(call, x):
    return call(x)


def small_network(outputs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def inputs(n, dimensions=4):
    return torch.randn(n, dimensions, generator=torch.Generator().manual_seed(1))


def from_jacobian(network, x):
    """{name: (1 / P) sum_p (d output_p / d w)^2, a mean over entries and samples}."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    jacobian = jacrev(lambda parameters: functional_call(network, parameters, (x,)))(parameters)  # (N, P, *entries)
    return {name: float(j.flatten(2).square().mean((0, 1, 2))) for name, j in jacobian.items()}


def test_linear_layer_equals_the_closed_form():
    # One output: d output / d w_i = x_i, whatever the sign; d output / d b = 1.
    x = inputs(37)
    mean, error = gauss_newton(nn.Linear(4, 1), output, (x,))
    squares = x.square().mean(1)
    assert mean["weight"] == pytest.approx(float(squares.mean()), rel=1e-5)
    assert error["weight"] == pytest.approx(float(squares.std() / 37**0.5), rel=1e-4)
    assert mean["bias"] == pytest.approx(1.0) and error["bias"] == pytest.approx(0.0, abs=1e-6)


def test_wide_linear_layer_divides_by_its_outputs():
    # The gradient of output_p by row p is s_p x: over all P rows the mean square is that of x, and the loss's mean over
    # P outputs divides it by P.
    x = inputs(11)
    mean, _ = gauss_newton(nn.Linear(4, 3), output, (x,))
    assert mean["weight"] == pytest.approx(float(x.square().mean()) / 3, rel=1e-5)
    assert mean["bias"] == pytest.approx(1 / 3)


def test_one_output_equals_the_jacobian_exactly():
    network, x = small_network(1), inputs(9)
    assert gauss_newton(network, output, (x,))[0] == pytest.approx(from_jacobian(network, x), rel=1e-5)
    flat = gauss_newton(network, lambda call, x: call(x).squeeze(1), (x,))[0]  # (N,) of one output each
    assert flat == pytest.approx(from_jacobian(network, x), rel=1e-5)


def test_several_outputs_equal_the_jacobian_in_the_mean_over_signs():
    network, x = small_network(6), inputs(3)
    mean, error = gauss_newton(network, output, (x.repeat(2000, 1),), chunk=2000)  # 2,000 draws of signs for each
    for name, expected in from_jacobian(network, x).items():
        assert abs(mean[name] - expected) < 4 * error[name] + 1e-6 * expected and error[name] < 0.05 * expected, name


def test_signs_follow_from_the_seed():
    signs = random_signs((1000, 3), 0)
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.1
    assert torch.equal(signs, random_signs((1000, 3), 0)) and not torch.equal(signs, random_signs((1000, 3), 1))


def test_prediction_is_the_increase_of_the_loss():
    # Of a linear model at its least squares the loss is exactly quadratic, with no first-order term. Errors of the
    # weights of random signs, so that products of two cancel in the mean over all 2^4 of them.
    x = inputs(50).double()
    y = torch.randn(50, 1, generator=torch.Generator().manual_seed(2)).double()
    solution = torch.linalg.lstsq(x, y).solution
    network = nn.Linear(4, 1, bias=False).double()
    network.weight.data = solution.T.clone()
    size = torch.tensor([0.1, 0.2, 0.3, 0.2]).double()
    before = (x @ solution - y).square().mean()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double()
    increases = [(x @ (solution + (s * size)[:, None]) - y).square().mean() - before for s in signs]
    by_entry = x.square().mean(0)
    assert float(torch.stack(increases).mean()) == pytest.approx(float((by_entry * size.square()).sum()))
    # Of errors of one size it is the value of the tensor times the sum of their squares.
    increases = [(x @ (solution + 0.1 * s[:, None]) - y).square().mean() - before for s in signs]
    mean, _ = gauss_newton(network, output, (x,))
    assert float(torch.stack(increases).mean()) == pytest.approx(mean["weight"] * 4 * 0.01, rel=1e-5)


@pytest.fixture
def run_and_model(tiny_preset, tiny_network, monkeypatch):
    monkeypatch.setattr(diffusion_fisher, "FISHER_GRID", 2)
    options = strategy_parser("").parse_args(["--preset", "quick", "--device", "cpu", "--curvature", "gauss-newton"])
    model = full_precision(tiny_network.config, tiny_network.state_dict(), {"label": "Baseline (FP32)"})
    return start(options), model


def test_table_is_that_of_the_networks_output(run_and_model, tiny_network):
    run, model = run_and_model
    table = diffusion_fisher.curvature_table(run, model)
    assert table.kind == "gauss-newton" and table.timesteps == [1, 250, 750] and table.samples == [4, 2, 2]
    digits = run.load_images("train")
    x0, t, noise = diffusion_fisher.noised(run, digits, [250] * 2)
    # The bias of the last convolution adds to each of the 1,024 pixels: with signs s its gradient is their sum.
    signs = random_signs(noise.shape, diffusion_fisher.derive_seed(diffusion_fisher.FISHER_SEED, "signs", 250))
    expected = float(signs.flatten(1).sum(1).square().mean() / 1024)
    assert tiny_network(Schedule().add_noise(x0, t, noise), t).shape == noise.shape
    assert float(table.values[1, table.names.index("output_conv.bias")]) == pytest.approx(expected, rel=1e-4)


def test_feedback_is_measured_where_errors_weigh_in_the_image(run_and_model, monkeypatch):
    run, model = run_and_model
    run = replace(run, preset=replace(run.preset, fisher_digits=200))
    monkeypatch.setattr(diffusion_fisher, "measure_feedback", lambda network, loss, samples: samples)
    x0, t, noise, signs = diffusion_fisher.rounding_feedback(run, model)
    weights = torch.tensor(Schedule().image_weights(list(range(1000)), run.image_variance))
    assert float(t.double().mean()) == pytest.approx(float((weights * torch.arange(1000)).sum() / weights.sum()), abs=3)
    assert x0.shape == noise.shape == signs.shape and set(signs.unique().tolist()) == {-1, 1}
    first = to_model_range(run.load_images("train")[:200])
    assert len(x0.unique(dim=0)) == 200 and not torch.equal(x0, first)  # of all digits, not of those that come first


def test_the_weighting_that_is_asked_for_decides_the_steps(run_and_model):
    run, model = run_and_model
    run = replace(run, curvature="fisher")
    table = diffusion_fisher.fisher_table(run, model)
    found = [tensor_values(replace(run, timestep_weighting=w), model) for w in ("first", "uniform", "image")]
    expected = [shrink(*table.estimates(weighting)).tolist() for weighting in ("first", "uniform", "image")]
    assert [list(values.values()) for values in found] == expected
    assert expected[0] != expected[1] != expected[2] != expected[0]


def test_labels_and_metadata_name_them(run_and_model):
    run, model = run_and_model
    for weighting, rule, budget in (
        ("first", "Gauss-Newton", "Gauss-Newton timestep 1"),
        ("uniform", "Gauss-Newton over all timesteps", "Gauss-Newton timestep all"),
        ("image", "Gauss-Newton by weight in the image", "Gauss-Newton"),
    ):
        other = replace(run, timestep_weighting=weighting)
        said = quantized_metadata(other, model, "Ratio", "0.25"), budget_metadata(other, model, "entropy", "10x")
        assert [about["label"] for about in said] == [f"Ratio 0.25 (FP16, {rule})", f"Budget 10x (entropy, {budget})"]
        assert all(about["curvature"] == "gauss-newton" for about in said)
    assert "curvature" not in quantized_metadata(run, model, "Uniform")
    fisher = replace(run, curvature="fisher", timestep_weighting="image")
    said = quantized_metadata(fisher, model, "Ratio", "0.25"), budget_metadata(fisher, model, "entropy", "10x")
    labels = ["Ratio 0.25 (FP16, Fisher by weight in the image)", "Budget 10x (entropy)"]
    assert [about["label"] for about in said] == labels
    assert not any("curvature" in about for about in said)


def test_tables_of_both_kinds_have_files_of_their_own(run_and_model, monkeypatch):
    run, model = run_and_model
    table, fisher = diffusion_fisher.curvature_table(run, model), diffusion_fisher.fisher_table(run, model)
    assert fisher.kind == "fisher" and not torch.equal(fisher.values, table.values)
    (path,), (fisher_path,) = run.out.glob("gauss-newton-*.safetensors"), run.out.glob("fisher-*.safetensors")
    monkeypatch.setattr(diffusion_fisher.information, "measure", None)  # both are found
    again = diffusion_fisher.curvature_table(run, model)
    assert torch.equal(again.values, table.values) and again.kind == table.kind
    for other, kind in ((path, "fisher"), (fisher_path, "gauss-newton")):
        with pytest.raises(CheckpointError, match=f"is not a {kind} file"):
            diffusion_fisher.information.load(other, model.sha256, kind)


def test_values_that_are_not_finite_are_named(run_and_model):
    run, model = run_and_model
    broken = {name: tensor * (torch.inf if name == "output_conv.weight" else 1) for name, tensor in model.state.items()}
    with pytest.raises(UserError, match=r"the Gauss-Newton value of .* is not finite"):
        diffusion_fisher.curvature_table(run, full_precision(model.config, broken, {}))
