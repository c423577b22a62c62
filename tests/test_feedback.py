"""Rounding by feedback against Babai's nearest plane, which it is, and against the layers whose inputs it looks at."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.choose import feedback, rounding
from common.choose.feedback import DAMPING, ROW_DAMPING, Feedback, factorize_rows, make_feedback, measure_feedback
from common.choose.patches import patches_of
from common.fisher.gauss_newton import random_signs, signed_sum
from common.formats import entropy


def of_one_set(moment):
    return make_feedback([(np.arange(len(moment)), moment)])


def correlated_moment(size, seed=0):
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T + 3 * torch.ones(size, size, dtype=torch.float64)


def damped(moment):
    return (moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)).numpy()


def nearest_plane(target, moment):
    """Babai's nearest plane for the lattice of integers under the norm x' M x, the last coordinate first."""
    basis = np.linalg.cholesky(moment).T  # columns are the images of the unit vectors
    q, r = np.linalg.qr(basis)
    y, codes = q.T @ basis @ target, np.zeros(len(target))
    for i in reversed(range(len(target))):
        codes[i] = np.rint((y[i] - r[i, i + 1 :] @ codes[i + 1 :]) / r[i, i])
    return codes


def test_equals_the_nearest_plane():
    moment = correlated_moment(9)
    feedback = of_one_set(moment)
    rows = np.random.default_rng(0).normal(size=(20, 9)) * 3
    codes = feedback.round(rows)
    # The nearest plane begins with the last coordinate, feedback with the first of its order.
    backwards = feedback.factors[0].order[::-1]
    matrix = damped(moment)[np.ix_(backwards, backwards)]
    expected = np.stack([nearest_plane(row[backwards], matrix) for row in rows])
    assert np.array_equal(codes[:, backwards], expected)


def test_gain_is_the_share_of_the_error_that_is_left():
    moment = correlated_moment(30)
    feedback = of_one_set(moment)
    rows = np.random.default_rng(0).normal(size=(5000, 30)) * 30

    def output_error(codes):
        error = rows - codes
        return np.einsum("ri,ij,rj", error, damped(moment), error)

    left = output_error(feedback.round(rows)) / output_error(np.rint(rows))
    assert 0.01 < feedback.gain < 0.7
    assert left == pytest.approx(feedback.gain, rel=0.03)


def test_inputs_that_do_not_meet_are_rounded_each_by_itself():
    feedback = of_one_set(torch.diag(torch.tensor([4.0, 1.0, 2.0, 3.0])))
    rows = np.random.default_rng(0).normal(size=(50, 4)) * 3
    assert np.array_equal(feedback.round(rows), np.rint(rows))
    assert feedback.gain == pytest.approx(1.0)


def test_layer_without_input_is_rounded_to_the_nearest():
    feedback = of_one_set(torch.zeros(4, 4))
    rows = np.random.default_rng(0).normal(size=(50, 4)) * 3
    assert np.array_equal(feedback.round(rows), np.rint(rows))


LAYERS = {
    "same": nn.Conv2d(3, 5, 3, padding=1),
    "down": nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    "up": nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1),
    "up, uneven": nn.ConvTranspose2d(3, 5, (3, 2), stride=(1, 3), padding=(0, 1)),
    "linear": nn.Linear(3, 5),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_rows_times_patches_are_the_output(layer):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 6, 7)
    feedback = Feedback([], isinstance(layer, nn.ConvTranspose2d), 1.0)
    rows = feedback.rows(layer.weight)
    with torch.no_grad():
        output = layer(x)
        expected = output.transpose(1, 2) if isinstance(layer, nn.Linear) else output.flatten(2)
        measured = layer.bias[:, None].expand_as(expected).clone()
        columns_seen, outputs_seen = [], []
        for columns, places, patches in patches_of(layer, x):
            measured[:, :, places] += rows[:, columns] @ patches
            columns_seen.extend(columns.tolist())
            outputs_seen.extend(torch.arange(expected.shape[2])[places].tolist())
    assert torch.allclose(measured, expected, atol=1e-5)
    assert sorted(columns_seen) == list(range(rows.shape[1]))
    assert len(set(outputs_seen)) == len(outputs_seen)
    assert np.array_equal(feedback.weight(rows.detach().numpy(), layer.weight.shape), layer.weight.detach().numpy())


@pytest.mark.parametrize("index", [0, 2, 4])
def test_factors_are_those_of_the_gradients_of_single_samples(index):
    """More places than output channels, fewer, and a transposed convolution: G'G and GG' by their definition."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(6, 20, 3, padding=1, stride=2), nn.Tanh(),
        nn.ConvTranspose2d(20, 3, 4, stride=2, padding=1), nn.Tanh(), nn.Flatten(),
    )  # fmt: skip
    x = torch.randn(30, 2, 8, 8)
    signs, loss = random_signs((30, 48), 0), signed_sum(lambda call, x: call(x))
    measured = measure_feedback(network, loss, (x, signs))[f"{index}.weight"]
    by_column = by_row = 0
    for n in range(30):
        network.zero_grad()
        loss(network, x[n : n + 1], signs[n : n + 1]).sum().backward()
        gradient = measured.rows(network[index].weight.grad).double()
        by_column, by_row = by_column + gradient.T @ gradient, by_row + gradient @ gradient.T
    sets = [(np.sort(f.order), by_column[np.sort(f.order)][:, np.sort(f.order)]) for f in measured.factors]
    wanted = make_feedback(sets, measured.transposed, by_row)
    assert sorted(np.concatenate([f.order for f in measured.factors])) == list(range(len(by_column)))
    for factor, expected in zip(measured.factors, wanted.factors, strict=True):
        assert np.array_equal(factor.order, expected.order)
        np.testing.assert_allclose(factor.upper, expected.upper, rtol=1e-3, atol=1e-4 * expected.upper.max())
    np.testing.assert_allclose(measured.by_rows.spread, wanted.by_rows.spread, atol=1e-5)
    assert measured.gain == pytest.approx(wanted.gain, rel=1e-4) and measured.gain < measured.column_gain


def test_the_factor_of_rows_tells_their_second_moments():
    moment = correlated_moment(9)
    mean = float(moment.diagonal().mean())
    expected = (moment.diagonal().numpy() / mean + ROW_DAMPING) / (1 + ROW_DAMPING)
    assert factorize_rows(moment).second_moments() == pytest.approx(expected)


def test_in_even_scales_the_second_moments_of_all_rows_are_alike():
    scale = torch.tensor([0.1, 1.0, 3.0, 2.0, 1.0])
    moment = (correlated_moment(5) * scale * scale[:, None]).double()
    of = Feedback([], False, 1.0, factorize_rows(moment))
    scales = of.even_scales(5)
    assert np.prod(scales) == pytest.approx(1) and scales.min() < 0.5 * scales.max()
    moments = of.with_scales(scales).by_rows.second_moments()
    assert moments == pytest.approx(np.full(5, moments[0]))
    assert Feedback([], False, 1.0).even_scales(3).tolist() == [1, 1, 1]


def test_only_the_upper_triangle_of_a_moment_is_read_and_what_is_not_finite_is_refused():
    moment = correlated_moment(9)
    (whole,), (half,) = (of_one_set(m).factors for m in (moment, moment.triu()))
    assert np.array_equal(half.upper, whole.upper)
    moment[2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        of_one_set(moment)


def test_moments_weigh_patches_by_the_gradient_of_their_output():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
    network[1].add_module("unused", nn.Linear(3, 3))
    x, y = torch.randn(40, 4), torch.randint(2, (40,))

    def loss(call, x, y):
        return F.cross_entropy(call(x), y, reduction="none")

    hidden = network[1](network[0](x))
    expected = 0
    for n in range(40):
        output = network[2](hidden[n : n + 1]).detach().requires_grad_()
        F.cross_entropy(output, y[n : n + 1]).backward()
        patch = hidden[n].detach().double()
        expected = expected + output.grad.double().square().sum() * torch.outer(patch, patch)
    measured = measure_feedback(network, loss, (x, y))
    assert set(measured) == {"0.weight", "2.weight"}
    wanted = of_one_set(expected).factors[0]
    assert np.array_equal(measured["2.weight"].factors[0].order, wanted.order)
    np.testing.assert_allclose(measured["2.weight"].factors[0].upper, wanted.upper, rtol=1e-4, atol=1e-5)


def test_coded_weights_with_feedback_make_better_outputs_in_as_many_bytes():
    torch.manual_seed(0)
    weight, mixing = torch.randn(40, 60), torch.randn(60, 60)
    x = (torch.randn(3000, 60) @ mixing).relu()
    weights, feedback = {"w": weight}, {"w": of_one_set(x.T @ x)}
    sizes, errors = [], []
    for choice in ({}, feedback):
        stored = rounding.encode(weights, {"w": 0.5}, choice)
        read = entropy.decode(stored, {"w": weight.shape})["w"]
        sizes.append(sum(t.nbytes for t in stored.values()))
        errors.append(float(((read - weight) @ x.T).square().mean()))
    assert sizes[1] < 1.05 * sizes[0]
    assert errors[1] < 0.7 * errors[0]


def test_gradients_at_dependent_places_have_factors():
    """Where a layer's output gradients are alike at all places, as where a deep layer sees little of the image."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(8, 64, 2, generator=generator) @ torch.randn(8, 2, 16, generator=generator)
    g[7] = 0.0
    patches = torch.randn(8, 30, 16, generator=generator)
    of_rows = torch.zeros(64, 64)
    factors = feedback._gradient_factors(g, patches, of_rows)
    gradients = (g.double() @ patches.double().transpose(1, 2)).flatten(0, 1)  # (8 x 64, 30)
    expected = gradients.T @ gradients
    assert torch.allclose(factors.double().T @ factors.double(), expected, rtol=1e-4, atol=1e-4 * expected.max())
