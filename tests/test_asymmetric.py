"""Rounding layer after layer, against the least squares that it solves and the outputs that it should keep."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from common.choose import asymmetric, rounding
from common.choose.asymmetric import DAMPING, _compensated, _look, _mean_lack, encode_in_turn, exact_inputs
from common.choose.feedback import no_feedback
from common.choose.patches import patches_of
from common.choose.rounding import Rounding, decoded
from common.formats import entropy
from common.formats.coder import LARGEST_CODE

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 7, 6)),
    "strided": (nn.Conv2d(3, 4, 3, padding=1, stride=2), (5, 3, 8, 8)),
    "transposed": (nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1), (5, 3, 4, 4)),
}


def network_of(*layers, seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(*layers).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def convolutions():
    return network_of(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(16, 12, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 2, 3, padding=1),
    )  # fmt: skip


def weights_of(network):
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def stored_in_turn(network, x, steps, how):
    """What is stored."""
    return encode_in_turn(network, (x,), exact_inputs(network, (x,)), weights_of(network), steps, how)


def feedback_of(network):
    return {
        f"{name}.weight": no_feedback(layer.weight.shape, isinstance(layer, nn.ConvTranspose2d))
        for name, layer in network.named_modules()
        if hasattr(layer, "weight")
    }


def loaded(network, stored):
    result = copy.deepcopy(network)
    result.load_state_dict(entropy.decode(stored, {name: w.shape for name, w in weights_of(network).items()}))
    return result


def images(count, seed=0, channels=1):
    x = torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(x, scale_factor=2, mode="bilinear")  # neighbours are alike


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_rounded_is_the_least_squares_solution(kind):
    """Of ||V X' - W X||^2 + d ||V - W||^2, by the normal equations of every single patch."""
    layer, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(shape, generator=generator)
    found = exact + 0.5 * torch.randn(shape, generator=generator).abs()
    seen = _look(layer, exact, found)
    feedback = no_feedback(layer.weight.shape, kind == "transposed")
    rows = feedback.rows(layer.weight.detach()).double().numpy()
    result = _compensated(rows, seen)
    assert sum(len(of.columns) for of in seen) == rows.shape[1]
    for i, of in enumerate(seen):
        x, y = (
            patches.transpose(1, 2).flatten(0, 1).double().numpy()
            for patches in (list(patches_of(layer, inputs))[i][2] for inputs in (exact, found))
        )
        own = rows[:, of.columns]
        damping = DAMPING * np.square(y).sum(0).mean()
        left = np.concatenate([y, np.sqrt(damping) * np.eye(y.shape[1])])
        right = np.concatenate([x @ own.T, np.sqrt(damping) * own.T])
        assert result[:, of.columns] == pytest.approx(np.linalg.lstsq(left, right, rcond=None)[0].T, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_mean_that_outputs_lack_is_that_of_the_layer_itself(kind):
    layer, shape = LAYERS[kind]
    exact, found = torch.randn(shape), torch.randn(shape) + 1
    other = copy.deepcopy(layer)
    nn.init.normal_(other.weight)
    feedback = no_feedback(layer.weight.shape, kind == "transposed")
    rows, rounded = (feedback.rows(of.weight.detach()).double().numpy() for of in (layer, other))
    with torch.inference_mode():
        missing = layer(exact) - other(found)
    expected = missing.flatten(0, 1).mean(0) if kind == "linear" else missing.mean((0, 2, 3))
    assert _mean_lack(rows, rounded, _look(layer, exact, found)) == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_some_places_stand_for_all_and_are_the_same_in_each_chunk(kind, monkeypatch):
    layer, shape = LAYERS[kind]
    exact, found = torch.randn(shape), torch.randn(shape)
    monkeypatch.setattr(asymmetric, "PLACES", 3)
    whole = _look(layer, exact, found)
    monkeypatch.setattr(asymmetric, "CHUNK", 2)
    chunks = _look(layer, exact, found)
    for a, b in zip(whole, chunks, strict=True):
        assert a.count == b.count == 3 * shape[0]
        for of in ("found", "lacking", "exact_sum", "found_sum"):
            assert torch.allclose(getattr(a, of), getattr(b, of), atol=1e-4), of


def test_a_layer_with_exact_inputs_is_rounded_as_it_is_and_outputs_come_nearer():
    network, x = convolutions(), images(64)
    weights = weights_of(network)
    steps = {name: 0.3 if weight.dim() > 1 else 0.01 for name, weight in weights.items()}
    how = Rounding(feedback_of(network), price=0.0)
    plain = rounding.encode(weights, steps, how.feedback, how.price)
    stored = stored_in_turn(network, x, steps, how)
    read, before = (entropy.decode(of, {n: w.shape for n, w in weights.items()}) for of in (stored, plain))
    assert torch.equal(read["0.weight"], before["0.weight"])
    assert not torch.equal(read["2.weight"], before["2.weight"])
    fresh = images(64, seed=1)
    with torch.inference_mode():
        exact = network(fresh)
        now, then = ((loaded(network, of)(fresh) - exact).square().mean() for of in (stored, plain))
    assert now < 0.5 * then
    assert all(torch.equal(weight, weights_of(convolutions())[name]) for name, weight in weights.items())


def test_each_output_channel_has_the_right_mean():
    network, x = convolutions(), images(64)
    weights = weights_of(network)
    steps = {name: 0.3 if weight.dim() > 1 else 1e-4 for name, weight in weights.items()}
    rounded = loaded(network, stored_in_turn(network, x, steps, Rounding(feedback_of(network))))
    with torch.inference_mode():
        assert torch.allclose(rounded(x).mean((0, 2, 3)), network(x).mean((0, 2, 3)), atol=1e-4)


def test_without_layers_that_have_feedback_it_is_plain_rounding():
    network = convolutions()
    weights = weights_of(network)
    steps = dict.fromkeys(weights, 0.1)
    found = stored_in_turn(network, images(3), steps, Rounding())
    expected = rounding.encode(weights, steps)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_layer_that_is_called_twice_is_rounded_once_and_one_that_is_not_called_all_the_same():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.one(self.one(x))

    network = Shared()
    weights = weights_of(network)
    steps = dict.fromkeys(weights, 0.05)
    stored = stored_in_turn(network, torch.randn(50, 4), steps, Rounding(feedback_of(network)))
    read = entropy.decode(stored, {name: w.shape for name, w in weights.items()})
    assert all(abs(read[name] - weight).max() < 0.2 for name, weight in weights.items())


@pytest.mark.parametrize("trellis", [False, True])
def test_codes_are_decoded_as_the_file_has_them(trellis):
    network = network_of(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16))
    weights = weights_of(network)
    steps = {name: 0.1 * np.exp2(np.arange(16) / 8)[:, None] if w.dim() > 1 else 0.01 for name, w in weights.items()}
    how = Rounding(feedback_of(network), trellis=trellis)
    codes = rounding.choose_codes(weights, steps, how)
    steps = {name: rounding.stored_steps(step) for name, step in steps.items()}
    read = entropy.decode(rounding.store(codes, steps, how), {name: w.shape for name, w in weights.items()})
    for name, of in codes.items():
        assert np.array_equal(decoded(of, steps[name], how.axis(name, of.shape)), read[name].numpy())


def test_no_code_passes_the_largest_where_steps_are_as_fine_as_can_be():
    network, x = convolutions(), images(16)
    weights = weights_of(network)
    steps = {name: 1.01 * float(weight.abs().max()) / LARGEST_CODE for name, weight in weights.items()}
    steps["0.weight"] = 0.5
    stored = stored_in_turn(network, x, steps, Rounding(feedback_of(network)))
    read = entropy.decode(stored, {name: w.shape for name, w in weights.items()})
    assert all(bool(weight.isfinite().all()) for weight in read.values())


def test_a_bias_of_zero_whose_steps_are_nothing_stays_zero():
    network, x = convolutions(), images(16)
    nn.init.zeros_(network[2].bias)
    weights = weights_of(network)
    steps = {name: 0.3 if weight.dim() > 1 else 0.01 for name, weight in weights.items()} | {"2.bias": 3e-30}
    stored = stored_in_turn(network, x, steps, Rounding(feedback_of(network)))
    assert not entropy.decode(stored, {name: w.shape for name, w in weights.items()})["2.bias"].any()


def test_a_weight_of_no_dimension_is_decoded_as_an_array():
    assert decoded(np.array(3), 0.5, None).shape == () and decoded(np.array(3), 0.5, None) == np.float32(1.5)


def test_exact_inputs_are_those_of_all_layers_when_they_are_first_called():
    network, x = convolutions(), images(2)
    inputs = exact_inputs(network, (x,))
    assert torch.equal(inputs["0"], x) and torch.equal(inputs["2"], network[:2](x))
    assert {name: tuple(of.shape[1:]) for name, of in inputs.items()} == {
        "0": (1, 8, 8), "2": (12, 8, 8), "4": (16, 4, 4), "6": (12, 8, 8),
    }  # fmt: skip
