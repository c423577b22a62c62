"""FID as of infinitely many images: at distances that are known, over many draws; its errors against their spread."""

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from common.ddpm.digits import load_digits
from common.metrics.estimate import Estimate, pool
from common.metrics.features import load_features
from common.metrics.frechet import Reference, fid, fid_unbiased
from common.metrics.scores import extract, make_reference
from common.metrics.spectrum import root_trace

FLAT, DECAYING = np.ones(64), np.geomspace(1, 1e-3, 256)  # deviations of features; real ones' decay like the latter


def reference_of(deviations):
    mean, covariance = np.zeros(len(deviations)), np.diag(deviations**2)
    return Reference(mean, covariance, np.diag(deviations), np.zeros((1, len(mean))), 0.0)


def stretch(deviations, share):
    """(mean, A): features r with the deviations become mean + A r, a Gaussian at a distance that grows with `share`."""
    rng, dimensions = np.random.default_rng(5), len(deviations)
    matrix = np.eye(dimensions) + share * rng.normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    return 0.3 * share * deviations * rng.normal(size=dimensions), matrix


def distance(deviations, mean, matrix):
    reference = reference_of(deviations)
    covariance = matrix @ reference.covariance @ matrix.T
    return calculate_frechet_distance(reference.mean, reference.covariance, mean, covariance)


def draws(deviations, images, number, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(images, len(deviations))) * deviations for _ in range(number))


# The sum of roots


def sample_eigenvalues(rng, freedom, deviations):
    """Of the sample covariance, ascending, and the error of the roots' sum to first order, which has mean zero."""
    x = rng.normal(size=(freedom, len(deviations))) * deviations
    values = np.sort(np.linalg.svd(x, compute_uv=False) ** 2 / freedom)
    return values, ((x**2).mean(0) / deviations - deviations).sum() / 2


@pytest.mark.parametrize(("freedom", "tolerance"), [(120, 0.004), (60, 0.006), (40, 0.008), (34, 0.01)])
def test_root_trace_is_that_of_the_population(freedom, tolerance):
    deviations, rng = np.linspace(0.2, 1.0, 40), np.random.default_rng(1)
    whole, plain = [], []
    for _ in range(150):
        values, luck = sample_eigenvalues(rng, freedom, deviations)
        whole.append(root_trace(values, freedom, 40)[0] - luck)
        plain.append(np.sqrt(values).sum() - luck)
    true = deviations.sum()
    assert np.mean(whole) == pytest.approx(true, rel=tolerance)
    assert np.mean(plain) < (1 - 8 * tolerance) * true


def test_root_trace_of_many_is_the_sum_of_roots():
    values = np.array([0.1, 0.5, 0.9, 4.0])
    trace, derivative = root_trace(values, 10**4, 4)
    assert trace == pytest.approx(np.sqrt(values).sum(), rel=1e-4)
    np.testing.assert_allclose(derivative, 0.5 / np.sqrt(values), rtol=2e-4)


@pytest.mark.parametrize("freedom", [60, 20, 15])
def test_derivatives_of_root_trace(freedom):
    values, _ = sample_eigenvalues(np.random.default_rng(2), freedom, np.linspace(0.3, 1.0, 20))
    trace, derivative = root_trace(values, freedom, 20)
    for k in range(len(values)):
        step = np.zeros(len(values))
        step[k] = 1e-5 * values[k]
        up, down = (root_trace(values + sign * step, freedom, 20)[0] for sign in (1, -1))
        assert derivative[k] == pytest.approx((up - down) / (2 * step[k]), rel=1e-5)
    assert derivative @ values == pytest.approx(trace / 2, rel=1e-6)  # a root's scale


def test_equal_eigenvalues_are_as_good_as_near_ones():
    values = np.array([0.3, 0.7, 0.7, 1.5])
    trace, derivative = root_trace(values, 30, 4)
    near, of_near = root_trace(values * [1, 1, 1 + 1e-4, 1], 30, 4)
    assert trace == pytest.approx(near, rel=5e-4)
    np.testing.assert_allclose(derivative, of_near, rtol=1e-3)


# Distances that are known


@pytest.mark.parametrize(("deviations", "number"), [(FLAT, 40), (DECAYING, 8)])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_mean_over_draws_is_the_distance(deviations, number, share):
    mean, matrix = stretch(deviations, share)
    true, reference = distance(deviations, mean, matrix), reference_of(deviations)
    unbiased, plain = [], []
    for x in draws(deviations, 300, number, seed=1):
        unbiased.append(fid_unbiased(mean + x @ matrix.T, reference).value)
        plain.append(fid(mean + x @ matrix.T, reference).value)
    of_mean = [np.std(values, ddof=1) / np.sqrt(number) for values in (unbiased, plain)]
    assert abs(np.mean(unbiased) - true) < 2.5 * of_mean[0]
    assert np.mean(plain) - true > 30 * of_mean[1]


@pytest.mark.parametrize(("images", "number"), [(300, 250), (1000, 200)])
def test_one_error_covers_two_thirds_of_the_draws(images, number):
    deviations = np.linspace(0.3, 1.0, 24)
    reference, first, second = reference_of(deviations), stretch(deviations, 0.2), stretch(deviations, 0.25)
    trues = [distance(deviations, *which) for which in (first, second)]
    assert 0 < trues[0] < trues[1]
    noise, single, paired, ratios = np.random.default_rng(9), [], [], []
    for x in draws(deviations, images, number, seed=images):
        other = x + 0.05 * deviations * noise.normal(size=x.shape)
        a = fid_unbiased(first[0] + x @ first[1].T, reference)
        b = fid_unbiased(second[0] + other @ second[1].T / np.sqrt(1 + 0.05**2), reference)
        difference, error = b.minus(a)
        single.append(abs(a.value - trues[0]) < a.error)
        paired.append(abs(difference - (trues[1] - trues[0])) < error)
        ratios.append(error / np.hypot(a.error, b.error))
    assert 0.60 <= np.mean(single) <= 0.76
    assert 0.60 <= np.mean(paired) <= 0.76
    assert max(ratios) < 0.5  # pairing is used


def test_the_error_is_honest_where_the_distance_is_zero():
    reference = reference_of(FLAT)
    found = [fid_unbiased(x, reference) for x in draws(FLAT, 300, 40, seed=3)]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert 0.9 * spread < np.mean([estimate.error for estimate in found]) < 1.5 * spread
    assert np.mean([abs(estimate.value) < 2 * estimate.error for estimate in found]) > 0.9


def test_held_out_digits_are_at_no_distance():
    network = load_features("mnist", torch.device("cpu"))
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    features = extract(load_digits("mnist5k", "test")[order], network)[0]
    reference = make_reference(extract(load_digits("mnist5k", "train"), network)[0])
    for images in (300, 600):
        unbiased, plain = fid_unbiased(features[:images], reference), fid(features[:images], reference)
        assert abs(unbiased.value) < 2 * unbiased.error < 0.04
        assert plain.value > 5 * plain.error


def test_the_distance_of_features_that_are_constant():
    reference = reference_of(np.array([1.0, 0.0, 2.0]))
    (x,) = draws(np.array([1.0, 0.0, 2.0]), 200, 1, seed=4)
    without = Reference(np.zeros(2), np.diag([1.0, 4.0]), np.diag([1.0, 2.0]), np.zeros((1, 2)), 0.0)
    expected = fid_unbiased(x[:, [0, 2]], without)
    estimate = fid_unbiased(x, reference)
    assert (estimate.value, estimate.error) == (pytest.approx(expected.value), pytest.approx(expected.error))
    same = fid_unbiased(np.ones((200, 3)), reference)  # all images alike: their distance is known
    assert same.value == pytest.approx(3 + 1 + 4) and same.error == pytest.approx(0, abs=1e-9)


def test_a_difference_to_itself_is_nothing_and_subsets_are_the_same():
    (x,) = draws(FLAT, 300, 1, seed=5)
    first, second = fid_unbiased(x, reference_of(FLAT)), fid_unbiased(x.copy(), reference_of(FLAT))
    assert first.value == second.value and first.minus(second) == (0.0, 0.0)
    assert first.influence.shape == (300,) and abs(first.influence.mean()) < 1e-10


def test_features_of_a_quadratic_statistic_count_pairs_once():
    # Known covariance 0 of one feature: FID is the squared mean, whose variance of N(0, 1) is 2 / N^2 without bias.
    reference = Reference(np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1)), 0.0)
    found = [fid_unbiased(x, reference) for x in draws(np.ones(1), 200, 300, seed=6)]
    values = np.array([estimate.value for estimate in found]) - 1  # the trace of the covariance is 1
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(300)
    assert np.sqrt(np.mean([e.error**2 for e in found])) == pytest.approx(values.std(), rel=0.1)


def test_draws_are_pooled_as_their_mean():
    rng = np.random.default_rng(7)
    parts = [rng.normal(size=50) for _ in range(3)]
    parts = [Estimate(float(i), part - part.mean(), 0.1 * rng.normal(size=(2, 50))) for i, part in enumerate(parts)]
    together = pool(parts)
    assert together.value == 1.0 and together.influence.shape == (150,)
    # Independent draws: the variance of their mean is that of each, summed, over 3^2.
    assert together.error == pytest.approx(np.sqrt(sum(part.error**2 for part in parts)) / 3, rel=0.01)
    assert pool([parts[0]]).error == parts[0].error
