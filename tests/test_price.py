"""The price of bits, against the entropy coder and against closed forms."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from common.formats import entropy, entropy_tables
from common.training import price
from common.training.price import CodeLengths, SizeControl, lengths_of, measure


def random_codes(scale, shape, seed=0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).round()


def test_the_slope_is_the_difference_of_the_lengths_of_the_two_nearest_codes():
    lengths = CodeLengths(torch.tensor([9.0, 4.0, 1.0, 3.0, 7.0]))  # of -2..2
    latent = torch.tensor([[-1.3, -0.9], [0.2, 1.999]])
    assert lengths.slope(latent).tolist() == [[4 - 9, 1 - 4], [3 - 1, 7 - 3]]
    assert lengths.slope(torch.tensor([-50.0, 50.0])).tolist() == [4 - 9, 7 - 3]  # beyond the table: its last


def test_the_slope_is_that_of_the_interpolated_bits():
    codes = random_codes(2, (40, 50))
    lengths, _ = measure({"w": codes})
    latent = codes.double() + 0.3

    def bits(latent):
        table, reach = lengths["w"].bits.double(), len(lengths["w"].bits) // 2
        below = latent.floor()
        share = latent - below
        at = below.long() + reach
        return ((1 - share) * table[at] + share * table[(at + 1).clamp(max=2 * reach)]).sum()

    (gradient,) = torch.autograd.grad(bits(latent.requires_grad_()), latent)
    inside = codes < codes.max()
    assert torch.allclose(lengths["w"].slope(latent.detach().float())[inside], gradient.float()[inside], atol=1e-5)


def test_lengths_are_logarithms_of_shares():
    codes = random_codes(3, (500,)).int().tolist()
    counts = Counter(codes)
    reach = max(map(abs, codes)) + 1
    assert reach < entropy_tables.DIRECT
    bits = lengths_of(np.array([counts[k] for k in range(-reach, reach + 1)]))
    for k in range(-reach, reach + 1):
        assert bits[k + reach] == pytest.approx(-math.log2((counts[k] or 0.5) / 500))


@pytest.mark.parametrize("scale", [0.4, 2, 60])  # with 60 most codes have remainders
def test_bits_are_those_of_the_entropy_coder(scale):
    latents = {name: random_codes(scale, (200, 300), seed) for seed, name in enumerate("ab")}
    latents |= {name: random_codes(scale, (9000,), 7) for name in "cd"}  # which share a table
    stored = entropy.encode({n: u.numpy().astype(np.int64) for n, u in latents.items()}, dict.fromkeys(latents, 1.0))
    lengths, bits = measure(latents)
    assert bits < 8 * len(stored["entropy:codes"]) < 1.015 * bits  # which learns the statistics as it goes
    assert lengths["c"] is lengths["d"] and lengths["a"] is not lengths["b"]
    assert measure({n: u + 0.4 for n, u in latents.items()})[1] == bits  # of the nearest codes


def test_codes_beyond_what_is_tabled_have_no_slope():
    lengths, bits = measure({"w": torch.tensor([[1e7, -3.0]])})
    assert lengths["w"].slope(torch.tensor([1e7])).item() == 0 and math.isfinite(bits)


def follow(control, updates, rate, first):
    """Sizes of codes whose logarithm falls at `rate` per update where the price is twice that of the best there is, and
    in proportion. It does not rise where the price is too low: codes that have shrunk do not grow back."""
    size, sizes = first, []
    for i in range(updates):
        control.take_loss(i, 1e-3 * (first / size) ** 2)
        best = 2 * math.log(2) * control.error / control.weights
        if i % 10 == 0:
            control.take_bits(i, 8 * size, 1.0)
        size *= math.exp(-rate * max(0.0, control.price / best - 1))
        sizes.append(size)
    return sizes


@pytest.mark.parametrize("rate", [2e-4, 4e-4, 8e-4, 2e-3])
def test_the_size_follows_the_ramp_and_hardly_overshoots(rate):
    control = SizeControl(1000.0, 1000, 4000)
    sizes = follow(control, 1000, rate, 1300.0)
    assert control.wanted(0) == 1300 and control.wanted(250) == pytest.approx(math.sqrt(1300 * 1000))
    assert control.wanted(500) == control.wanted(999) == 1000
    for i, size in enumerate(sizes[50:], start=50):
        assert size == pytest.approx(control.wanted(i), rel=0.03)
    assert 0.993 < min(sizes) / 1000 < 1.001 and sizes[-1] < 1005
    if rate == price.RESPONSE:
        assert min(sizes) > 998


def test_on_a_steep_ramp_the_price_is_what_its_slope_needs():
    control = SizeControl(1000.0, 100, 4000, start=2000.0, error=1e-3)
    control.take_bits(25, 8 * control.wanted(25), 0.5)
    needed = math.log(control.wanted(25) / control.wanted(26)) / 0.5
    best = 2 * math.log(2) * 1e-3 / 4000
    assert control.excess == pytest.approx(0) and control.price / best - 1 == pytest.approx(needed / price.RESPONSE)
    rising = SizeControl(1000.0, 100, 4000, start=900.0, error=1e-3)
    rising.take_bits(25, 8 * rising.wanted(25), 0.5)
    assert rising.price / best == pytest.approx(1)


def test_on_the_ramp_a_bit_costs_what_it_is_worth_at_the_best_there_is():
    """The derivative of error * 2^(-2 bits / weights) in the bits, at the running mean of the loss."""
    control = SizeControl(100.0, 1000, 400, overhead=20.0)
    for i, loss in enumerate((3e-3, 1e-3)):
        control.take_loss(i, loss)
    control.take_bits(0, 8 * 80.0, 1.0)
    error = price.MEMORY * 3e-3 + (1 - price.MEMORY) * 1e-3
    h = 1e-3
    slope = error * (2 ** (-2 * -h / 400) - 2 ** (-2 * h / 400)) / (2 * h)
    assert control.size == 100 and control.price == pytest.approx(slope, rel=1e-6)


def test_a_size_above_the_ramp_raises_the_price_and_one_below_lowers_it():
    prices = []
    for size in (990.0, 1000.0, 1010.0, 1500.0):
        control = SizeControl(1000.0, 100, 4000, start=1000.0, overhead=200.0, error=1e-3)
        control.take_bits(99, 8 * (size - 200), 1.0)
        prices.append(control.price / (2 * math.log(2) * 1e-3 / 4000))
    assert prices[0] < 1 and prices[1] == pytest.approx(1)
    assert prices[2] == pytest.approx(1.01 ** (price.PROPORTIONAL + price.INTEGRAL))
    assert prices[3] == pytest.approx(math.exp(price.FARTHEST * (price.PROPORTIONAL + price.INTEGRAL)))
