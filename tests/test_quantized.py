"""Rounded weights and learned steps, against finite differences."""

import pytest
import torch
from torch import nn

from common.training.price import measure
from common.training.quantized import PART, Quantized, start_from


def layer():
    torch.manual_seed(0)
    return nn.Linear(40, 30)


def test_weights_start_in_the_cells_of_their_codes_on_the_side_of_the_networks_own():
    network = nn.Linear(3, 1, bias=False)
    network.weight.data = torch.tensor([[0.9, 0.73, 0.5]])
    start = start_from(network, {"weight": torch.tensor([[0.7, 0.7, 0.7]])}, {"weight": 0.1})
    assert start.unrounded()["weight"].tolist()[0] == pytest.approx([0.745, 0.73, 0.655])
    assert start.rounded()["weight"].tolist()[0] == pytest.approx([0.7, 0.7, 0.7])
    assert start.steps()["weight"] == pytest.approx(0.1)


def test_the_network_gets_the_rounded_weights_and_the_latent_ones_their_gradient():
    network = layer()
    start = start_from(network, dict(network.named_parameters()), {"weight": 0.02, "bias": 0.01})
    rounded = start.rounded()
    assert torch.allclose(rounded["weight"], (network.weight / 0.02).round() * 0.02)
    towards = torch.randn(30, 40)
    (rounded["weight"] * towards).sum().backward()
    assert torch.allclose(start.latents["weight"].grad, 0.02 * towards)


def test_a_step_moves_at_constant_weight():
    network = layer()
    start = start_from(network, dict(network.named_parameters()), {"weight": 0.02, "bias": 0.01})
    before = start.unrounded()
    for p in start.parameters().values():
        p.grad = torch.zeros_like(p)
    with start.steps_alone():
        start.log_steps["weight"] += 0.3
    assert start.steps()["weight"] == pytest.approx(0.02 * 2.718281828**0.3)
    for name, weight in start.unrounded().items():
        assert torch.allclose(weight, before[name], atol=1e-7)
    codes = before["weight"] / start.steps()["weight"]
    assert torch.allclose(start.latents["weight"], codes, atol=1e-5)


def test_the_gradient_of_a_step_is_that_of_the_bits_at_constant_weight():
    """With no loss but bits: a step larger by a little makes their sum, interpolated between codes, so much smaller."""
    network = layer()
    start = start_from(network, {"weight": network.weight, "bias": network.bias}, {"weight": 0.02, "bias": 0.01})
    lengths, _ = measure(start.latents)
    table = lengths["weight"].bits.double()
    u = start.latents["weight"].detach().double()

    def bits(factor):
        below = (u / factor).floor()
        at = below.long() + len(table) // 2
        share = u / factor - below
        return float(((1 - share) * table[at] + share * table[at + 1]).sum())

    start.log_steps["weight"].grad = torch.zeros(())
    start.latents["weight"].grad = lengths["weight"].slope(u.float())
    with Quantized({"weight": start.latents["weight"]}, {"weight": start.log_steps["weight"]}).steps_alone():
        pass
    expected = (bits(1.0001) - bits(0.9999)) / 0.0002
    assert float(start.log_steps["weight"].grad) == pytest.approx(expected, rel=0.02)
    assert expected < 0


def test_the_gradient_of_a_step_is_that_of_the_rounding_errors():
    """With a loss that is linear in the weights: the step changes them by their rounding errors alone."""
    network = layer()
    start = start_from(network, dict(network.named_parameters()), {"weight": 0.02, "bias": 0.01})
    towards = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    (start.rounded()["weight"] * towards).sum().backward()
    start.latents["bias"].grad, start.log_steps["bias"].grad = torch.zeros(30), torch.zeros(())
    codes = start.latents["weight"].detach().clone()
    with start.steps_alone():
        pass
    expected = (towards * 0.02 * (codes.round() - codes)).sum()
    assert float(start.log_steps["weight"].grad) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_steps_by_rows_are_those_of_the_rows_alone():
    """A network in two parts, each with one step, has the same rounded weights and gradients."""
    network = layer()
    towards = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    fine, coarse = 2**-5.5, 2**-4.25
    rows = torch.cat([torch.full((10, 1), fine), torch.full((20, 1), coarse)])
    whole = start_from(network, {"weight": network.weight, "bias": network.bias}, {"weight": rows.numpy(), "bias": 0.1})

    def moved(start, towards):
        """The rounded weights, and the gradient of the steps, which move by it."""
        for p in start.parameters().values():
            p.grad = torch.zeros_like(p)
        rounded = start.rounded()["weight"]
        (rounded * towards).sum().backward()
        with start.steps_alone():
            start.log_steps["weight"] += 5 * PART
        return rounded, start.log_steps["weight"].grad

    rounded, gradient = moved(whole, towards)
    for of, step in ((slice(0, 10), fine), (slice(10, 30), coarse)):
        part = nn.Linear(40, 1, bias=False)
        part.weight.data = network.weight.data[of].clone()
        start = start_from(part, {"weight": part.weight}, {"weight": step})
        rounded_part, of_part = moved(start, towards[of])
        assert torch.allclose(rounded_part, rounded[of])
        assert float(of_part) == pytest.approx(float(gradient[of].sum()), rel=1e-4)
        assert torch.allclose(start.latents["weight"], whole.latents["weight"][of], atol=1e-5)


def test_steps_by_rows_are_whole_parts_of_an_octave_and_their_gradient_is_not_lost():
    network = nn.Linear(2, 2, bias=False)
    network.weight.data = torch.tensor([[0.32, -0.19], [0.4, 0.1]])
    start = start_from(network, {"weight": network.weight}, {"weight": torch.tensor([[0.104], [0.251]]).numpy()})
    steps = [2**-3.25, 2**-2.0]
    assert start.steps()["weight"].ravel().tolist() == pytest.approx(steps)
    rounded = [3 * steps[0], -2 * steps[0], 2 * steps[1], 0.0]
    assert start.rounded()["weight"].ravel().tolist() == pytest.approx(rounded)
    start.rounded()["weight"].sum().backward()
    assert start.log_steps["weight"].grad.ravel().tolist() == pytest.approx([(3 - 2) * steps[0], (2 + 0) * steps[1]])


def test_steps_by_rows_move_at_constant_weight_whether_or_not_they_reach_the_next_on_the_grid():
    network = layer()
    steps = torch.full((30, 1), 0.0207).numpy()
    start = start_from(network, dict(network.named_parameters()), {"weight": steps, "bias": 0.01})
    before = start.unrounded()["weight"]
    assert torch.allclose(before, network.weight, atol=0.06 * 0.0207)  # what is left outside of the cells' middle
    found = set()
    for _ in range(12):
        for p in start.parameters().values():
            p.grad = torch.zeros_like(p)
        with start.steps_alone():
            start.log_steps["weight"] += 0.2 * PART
        assert torch.allclose(start.unrounded()["weight"], before, atol=1e-6)
        found.add(start.steps()["weight"].item(0))
    assert len(found) == 3
