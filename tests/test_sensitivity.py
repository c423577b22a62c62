"""Tensors quantized one at a time: increases of the loss against those measured by hand."""

import numpy as np
import pytest
import torch

from common import sensitivity
from common.diffusion import Schedule, denoising_loss
from common.model import full_precision
from common.sensitivity import Increases


def test_each_tensor_is_quantized_alone_and_put_back(tiny_network):
    model = full_precision(tiny_network.config, tiny_network.state_dict(), {})
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(3, 1, 32, 32, generator=generator), torch.randn(3, 1, 32, 32, generator=generator)
    t = torch.tensor([5, 300, 900])
    measured = sensitivity.quantize_each_alone(model, "int2", x0, t, noise)
    assert len(measured.names) == 58 == len(measured.squared_error) and measured.loss.shape == (58, 3)
    with torch.no_grad():
        before = denoising_loss(tiny_network, Schedule(), x0, t, noise)
        for i in (0, 30, 57):
            alone = model.quantize([measured.names[i]], "int2", {})
            expected = denoising_loss(alone.network(), Schedule(), x0, t, noise) - before
            assert torch.allclose(torch.from_numpy(measured.loss[i]).float(), expected, rtol=0, atol=1e-6)
            change = alone.state[measured.names[i]] - model.state[measured.names[i]]
            assert measured.squared_error[i] == pytest.approx(float(change.square().sum()), rel=1e-5)


def test_rank_correlation_of_known_orders():
    a = np.arange(40.0)
    assert sensitivity.rank_correlation(a, a**3) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert sensitivity.rank_correlation(a, -a) == pytest.approx((-1.0, 0.0), abs=1e-12)
    rho, error = sensitivity.rank_correlation(a, np.random.default_rng(0).normal(size=40))
    assert abs(rho) < 4 * error
    assert error == pytest.approx(1 / 39**0.5, rel=0.25)  # that of independent ranks


@pytest.mark.filterwarnings("ignore:An input array is constant")  # draws of three tensors may all be one
def test_tables_name_predictors_and_sum_layers():
    names = ["layer1.a.weight", "layer1.b.weight", "layer2.c.weight"]
    loss = np.array([[1e-6, 3e-6], [1e-6, 1e-6], [5e-6, 7e-6]])
    increases = {"int4": Increases(names, loss, np.array([1.0, 2.0, 3.0]))}
    table = sensitivity.format_layers(increases)
    assert "3.0 ± 1.0" in table.splitlines()[1] and "6.0 ± 1.0" in table.splitlines()[2]
    lines = sensitivity.format_correlations(increases, {"timestep 1": np.array([2.0, 1.0, 3.0])}).splitlines()
    assert lines[1].startswith("Fisher, timestep 1 ") and "1.00" in lines[1]
    assert lines[-1].startswith("squared error alone") and "0.50" in lines[-1]
