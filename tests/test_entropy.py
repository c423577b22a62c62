"""Entropy coding: what is read is what was rounded, in close to the bytes that its entropy says."""

import numpy as np
import pytest
import torch

from common.choose import rounding
from common.formats import entropy


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
        # Half a step off, or less than a whole one where the shorter code was taken; never beyond the weight.
        assert ((weight - weights[name]).abs() < 1.001 * step + 1e-6).all()
        assert (weight.abs() <= weights[name].abs() + 0.501 * step + 1e-6).all()


def test_codes_of_every_size_survive():
    """Magnitudes around each power of two, where symbols and remainders change."""
    edges = [0, 1, 15, 16, 17, 31, 32, 33, *(2**k + d for k in range(6, 24) for d in (-1, 0, 1))]
    codes = torch.tensor([*edges, *(-e for e in edges)], dtype=torch.float32)
    symbols, remainders, widths = entropy._split(codes.numpy().astype(np.int64))
    assert (remainders < 2**widths).all() and (remainders >= 0).all()
    joined, rest = entropy._join(symbols, entropy._remainder_bits(remainders, widths))
    assert joined.tolist() == codes.tolist() and len(rest) == 0
    # And monotonic: each symbol holds an interval of codes.
    ordered = entropy._split(np.arange(5000))[0]
    assert (np.diff(ordered) >= 0).all()


def test_every_tensor_has_its_own_step():
    weights = random_weights()
    steps = {name: 0.1 * (i + 1) for i, name in enumerate(weights)}
    for name, weight in decoded(weights, steps).items():
        codes = weight.double() / float(np.float32(steps[name]))
        assert torch.allclose(codes, codes.round(), rtol=0, atol=1e-4), name


def test_size_is_close_to_the_entropy_of_the_codes():
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(400, 500, generator=generator)}
    for step, tolerance in ((0.5, 0.01), (0.05, 0.01)):
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
