"""Entropy coding: what is read is what was rounded, in close to the bytes that its entropy says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.choose import rounding
from common.choose.feedback import no_feedback
from common.formats import entropy
from common.formats.packed import load_model


def random_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (8, 6, 3, 3), "linear": (30, 20), "bias": (8,), "norm": (6,), "one": (1, 1)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def decoded(weights, steps):
    return entropy.decode(rounding.encode(weights, steps), {name: w.shape for name, w in weights.items()})


@pytest.mark.parametrize("step", [10.0, 1.0, 0.3, 0.01, 1e-4, 1e-6])
def test_decoded_weights_are_multiples_of_the_step_near_the_weights(step):
    weights = random_weights()
    for name, weight in decoded(weights, dict.fromkeys(weights, step)).items():
        assert weight.dtype == torch.float32 and weight.shape == weights[name].shape
        codes = weight.double() / float(np.float32(step))
        assert torch.allclose(codes, codes.round(), rtol=1e-7, atol=1e-3)  # the product is rounded to float32
        assert ((weight - weights[name]).abs() < 2 * step + 1e-6).all()  # shorter codes may be next but one


@pytest.mark.parametrize("step", [1.0, 0.01])
def test_without_a_price_codes_are_the_nearest(step):
    weights = random_weights()
    stored = rounding.encode(weights, dict.fromkeys(weights, step), price=0.0)
    for name, weight in entropy.decode(stored, {name: w.shape for name, w in weights.items()}).items():
        assert ((weight - weights[name]).abs() < 0.501 * step).all()


def test_files_of_version_1_are_read():
    """Written by the software that knew no other: the hash is that of its own weights."""
    model = load_model(Path(__file__).parent / "data/entropy-version-1.safetensors")
    assert entropy.version_of(model.stored) == 1 and model.is_entropy_coded
    assert model.sha256 == "63f40cce40dbc56339f84688172fdb9781f4e1de64826bc54709acd699d9a288"


def test_few_bytes_of_version_1_stand_for_few_weights():
    """A table of one entry takes no symbols; 8 bytes are granted to any file."""
    stored = {"entropy:steps": torch.ones(1), "entropy:ranges": torch.tensor([[0, 1]], dtype=torch.int16)}
    stored |= {"entropy:tables": torch.ones(1, dtype=torch.uint8)}
    stored |= dict.fromkeys(("entropy:symbols", "entropy:remainders"), torch.empty(0, dtype=torch.uint8))
    assert not entropy.decode(stored, {"a": torch.Size([8, 12_000])})["a"].any()
    with pytest.raises(ValueError, match="96001 weights, more than 0 bytes"):
        entropy.decode(stored, {"a": torch.Size([96_001, 1])})
    with pytest.raises(ValueError, match="version 1"):
        entropy.extend(stored, {"a": torch.Size([8, 8])}, {}, {})


def test_output_channels_of_a_transposed_convolution_are_the_trellis_of_its_own_axis():
    weights = {"up": torch.randn(10, 9, 4, 4, generator=torch.Generator().manual_seed(0))}
    feedback = {"up": no_feedback(weights["up"].shape, transposed=True)}
    stored = rounding.encode(weights, {"up": 0.3}, feedback, trellis=True)
    assert stored["entropy:layout"].tolist() == [2]
    read = entropy.decode(stored, {"up": weights["up"].shape})["up"]
    assert (read - weights["up"]).square().mean() < 0.9 * 0.6**2 / 12  # less than of every second multiple
    plain = entropy.decode(rounding.encode(weights, {"up": 0.3}, trellis=True), {"up": weights["up"].shape})["up"]
    errors = [float((found - weights["up"]).square().mean()) for found in (plain, read)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_every_tensor_has_its_own_step():
    weights = random_weights()
    steps = {name: 0.1 * (i + 1) for i, name in enumerate(weights)}
    for name, weight in decoded(weights, steps).items():
        codes = weight.double() / float(np.float32(steps[name]))
        assert torch.allclose(codes, codes.round(), rtol=0, atol=1e-4), name


def test_size_is_close_to_the_entropy_of_the_codes():
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(400, 500, generator=generator)}
    for step, tolerance in ((0.5, 0.015), (0.05, 0.03)):
        stored = rounding.encode(weights, {"w": step})
        read = entropy.decode(stored, {"w": weights["w"].shape})["w"]
        counts = torch.unique((read / step).round(), return_counts=True)[1].double()
        ideal = float(-(counts * (counts / counts.sum()).log2()).sum()) / 8
        assert sum(t.nbytes for t in stored.values()) == pytest.approx(ideal, rel=tolerance)


def test_shorter_codes_are_taken_only_where_they_pay():
    """At the same bytes the squared error is smaller than that of rounding to the nearest."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(300, 400, generator=generator) * 0.999 + 0.0005)

    def rate_and_error(step):
        stored = rounding.encode({"w": weight}, {"w": step})
        read = entropy.decode(stored, {"w": weight.shape})["w"]
        return sum(t.nbytes for t in stored.values()), float((read - weight).square().mean())

    size, error = rate_and_error(1.0)
    nearest = []  # (bytes by entropy, error) of plain rounding, for steps around
    for step in np.linspace(0.8, 1.8, 60):
        codes = (weight / step).round()
        counts = torch.unique(codes, return_counts=True)[1].double()
        entropy_bytes = float(-(counts * (counts / counts.sum()).log2()).sum()) / 8
        nearest.append((entropy_bytes, float((codes * step - weight).square().mean())))
    at_same_size = min(other for other_size, other in nearest if other_size <= size)
    assert error < 0.99 * at_same_size


def test_same_weights_give_the_same_bytes():
    weights = random_weights()
    a, b = (rounding.encode(weights, dict.fromkeys(weights, 0.1)) for _ in range(2))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_all_zero_codes_take_next_to_nothing():
    weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0)) * 0.01, "b": torch.zeros(5)}
    stored = rounding.encode(weights, {"w": 1.0, "b": 1.0})
    assert sum(t.nbytes for t in stored.values()) < 30
    read = entropy.decode(stored, {name: w.shape for name, w in weights.items()})
    assert not any(w.any() for w in read.values())


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_a_step_that_is_not_positive_is_refused(step):
    with pytest.raises(ValueError, match="not positive"):
        rounding.encode({"w": torch.ones(2, 2)}, {"w": step})


def test_a_step_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="too small"):
        rounding.encode({"w": torch.ones(2, 2)}, {"w": 1e-9})
