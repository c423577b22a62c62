"""Trellis-coded quantization: the best of all paths, by brute force, and the bits that theory says it saves."""

import itertools

import numpy as np
import pytest
import torch

from common.choose import rounding
from common.choose.feedback import ROW_DAMPING, Feedback, RowFactor, factorize_rows, no_feedback
from common.formats import entropy
from common.formats.trellis import NO_TRELLIS, TRELLIS, columns_of, multiples, of_columns


def test_states_are_those_of_a_code_of_eight_states():
    """Each is reached from two, and by odd and even integers from one quantizer to different ones or the same."""
    assert TRELLIS.shape == (8, 2)
    assert sorted(TRELLIS.ravel().tolist()) == [state for state in range(8) for _ in range(2)]
    # The parity check of Ungerboeck's code, octal 13 and 04, along any path: z0 is the quantizer, z1 the parity.
    bits = np.random.default_rng(0).integers(0, 2, 200)
    state, quantizer = 0, []
    for bit in bits:
        quantizer.append(state & 1)
        state = TRELLIS[state, bit]
    z0, z1 = np.array(quantizer), bits
    assert not ((z0[3:] + z0[2:-1] + z0[:-3] + z1[1:-2]) % 2).any()


def test_multiples_follow_the_quantizers():
    codes = np.array([[3, -2, 1, 0, -1, 5]])
    state, expected = 0, []
    for code in codes[0]:
        expected.append(2 * code - np.sign(code) * (state & 1))
        state = TRELLIS[state, code & 1]
    assert multiples(codes, TRELLIS).tolist() == [expected]
    assert multiples(codes, NO_TRELLIS).tolist() == codes.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_finds_the_best_of_all_paths(seed):
    random = np.random.default_rng(seed)
    targets, weights = (random.normal(size=6) * 1.5).clip(-3.4, 3.4), random.uniform(0.5, 2, 6)
    lengths = np.stack([1 + abs(np.arange(-9, 10)) * slope for slope in (0.9, 1.3)])
    price = 0.3

    def cost(codes):
        total, state = 0.0, 0
        for r, code in enumerate(codes):
            value = 2 * code - np.sign(code) * (state & 1)
            total += weights[r] * (targets[r] - value) ** 2 + price * lengths[state & 1, 9 + code]
            state = TRELLIS[state, code & 1]
        return total

    best = min(cost(codes) for codes in itertools.product(range(-2, 3), repeat=6))
    feedback = Feedback(no_feedback(torch.Size([6, 1])).factors, False, 1.0, RowFactor(weights, np.empty((0, 0))))
    (found,) = feedback.round(targets[:, None], lengths, price / weights.mean(), next_state=TRELLIS).T
    assert cost(found) == pytest.approx(best, rel=1e-12)


def test_rows_make_good_each_others_errors_as_the_nearest_plane_does():
    """Without a trellis and a price, a column is rounded by Babai's nearest plane, the first row first."""
    random = np.random.default_rng(0)
    factor = random.normal(size=(7, 7))
    moment = torch.from_numpy(factor @ factor.T + np.ones((7, 7)))
    columns = no_feedback(torch.Size([7, 40])).factors
    codes = Feedback(columns, False, 1.0, factorize_rows(moment)).round(targets := random.normal(size=(7, 40)) * 3)
    matrix = moment.numpy() / float(moment.diagonal().mean()) + ROW_DAMPING * np.eye(7)
    basis = np.linalg.cholesky(matrix[::-1, ::-1]).T  # of the rows in reverse: the plane begins with the last
    for target, found in zip(targets[::-1].T, codes[::-1].T, strict=True):
        expected, y = np.zeros(7), basis @ target
        for i in reversed(range(7)):
            expected[i] = np.rint((y[i] - basis[i, i + 1 :] @ expected[i + 1 :]) / basis[i, i])
        assert found.tolist() == expected.tolist()


def test_each_path_of_the_trellis_carries_its_own_feedback():
    """The error that the rows' moment weighs is smaller than that of a trellis that does not look at it."""
    random = np.random.default_rng(0)
    moment = torch.from_numpy(np.full((64, 64), 0.7) + 0.3 * np.eye(64))
    columns = no_feedback(torch.Size([64, 50])).factors
    targets = random.normal(size=(64, 50)) * 10

    def error(by_rows):
        codes = Feedback(columns, False, 1.0, by_rows).round(targets, next_state=TRELLIS)
        rest = targets - multiples(np.ascontiguousarray(codes.T), TRELLIS).T
        return float(np.einsum("rk,rs,sk", rest, moment.numpy(), rest))

    assert error(factorize_rows(moment)) < 0.75 * error(None)


def excess_bits(trellis, step):
    """Bits for each of Gaussian weights beyond the least that their squared error could be had for, log2(1 / D) / 2."""
    weight = torch.randn(256, 400, generator=torch.Generator().manual_seed(0))
    stored = rounding.encode({"w": weight}, {"w": step}, trellis=trellis)
    read = entropy.decode(stored, {"w": weight.shape})["w"]
    bits = 8 * stored["entropy:codes"].numel() / weight.numel()
    return bits + 0.5 * np.log2(float((read - weight).square().mean())), bits


def test_a_trellis_saves_the_bits_that_simulations_of_it_report():
    """At 2 bits entropy-coded uniform quantization is 0.25 above the bound, 8-state trellis-coded quantization 0.1 to
    0.15 (Marcellin 1994, "On entropy-constrained trellis coded quantization": within 0.55 dB, 0.09 bits, with
    optimised codebooks)."""
    plain, plain_bits = excess_bits(False, 1.0)
    coded, coded_bits = excess_bits(True, 0.55)
    assert plain_bits == pytest.approx(2.0, abs=0.1) and coded_bits == pytest.approx(2.1, abs=0.1)
    assert 0.23 < plain < 0.28
    assert 0.10 < coded < 0.155


@pytest.mark.parametrize("axis", [0, 1])
def test_columns_of_a_weight_and_back(axis):
    weight = np.random.default_rng(0).normal(size=(9, 10, 3, 3))
    columns = columns_of(weight, axis)
    assert columns.shape == (weight.size // weight.shape[axis], weight.shape[axis])
    assert np.array_equal(columns[4], weight[:, 0, 1, 1] if axis == 0 else weight[0, :, 1, 1])
    assert np.array_equal(of_columns(columns, weight.shape, axis), weight)
