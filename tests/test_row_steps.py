"""Steps by rows: what a file says of them, and weights that are multiples of them."""

import numpy as np
import pytest
import torch

from common.choose import allocation, rounding
from common.choose.feedback import make_feedback
from common.formats import entropy
from common.formats.row_steps import LARGEST_EXPONENT, join, parts, row_axis, stored_steps


def steps_of(values, axis=0, dimensions=4):
    return np.array(values, np.float32).reshape([-1 if i == axis else 1 for i in range(dimensions)])


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv": (8, 6, 3, 3), "up": (5, 12, 2, 2), "bias": (8,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def random_steps(seed=0):
    generator = np.random.default_rng(seed)
    conv, up = (0.1 * np.exp2(generator.normal(size=rows)) for rows in (8, 12))
    return {"conv": steps_of(conv), "up": steps_of(up, axis=1), "bias": 0.01}


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_steps_in_parts_of_octaves_are_told_exactly():
    steps = steps_of([0.3, 0.3 * 2 ** (1 / 32), 0.6, 0.3 / 2 ** (5 / 8), 1.2])
    own, exponents = parts(steps)
    assert own == np.float32(0.3 * 2 ** (1 / 32)) and exponents.tolist() == [-1, 0, 31, -21, 63]
    assert stored_steps(steps) == pytest.approx(steps, rel=1e-6)


def test_others_become_the_nearest_and_these_are_told_exactly():
    steps = random_steps()["conv"]
    stored = stored_steps(steps)
    assert abs(np.log2(stored / steps)).max() <= 1 / 64 + 1e-6
    assert np.array_equal(stored_steps(stored), stored)
    assert np.sort(steps.ravel())[3] in stored  # the median, of which the others are multiples


@pytest.mark.parametrize(
    "step, axis", [(0.5, None), (np.ones((1, 1)), None), (np.ones((3, 1)), 0), (np.ones((1, 3, 1, 1)), 1)]
)
def test_rows_are_the_dimension_that_steps_differ_along(step, axis):
    assert row_axis(step) == axis


def test_weights_that_are_multiples_come_back():
    """Each row with its own step; of the transposed convolution the second dimension."""
    steps = {name: stored_steps(step) for name, step in random_steps().items()}
    codes = {name: (w / torch.as_tensor(steps[name])).round().numpy().astype(np.int64) for name, w in weights().items()}
    stored = entropy.encode(codes, steps)
    assert entropy.version_of(stored) == 3 and stored["entropy:layout"].tolist() == [3, 6, 0]
    read = entropy.decode(stored, shapes_of(codes))
    for name in codes:
        assert np.array_equal(read[name].numpy(), codes[name].astype(np.float32) * steps[name]), name
        assert np.array_equal(entropy.steps_of(stored, shapes_of(codes))[name], steps[name]), name


def test_a_row_of_coarser_steps_is_rounded_to_them():
    weight = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    steps = steps_of([0.01, 0.1, 0.2, 0.4], dimensions=2)
    read = entropy.decode(rounding.encode({"w": weight}, {"w": steps}, price=0.0), {"w": weight.shape})["w"]
    errors = (read - weight).square().mean(1).sqrt() / stored_steps(steps).ravel()
    assert errors.tolist() == pytest.approx([12**-0.5] * 4, rel=0.1)


def test_feedback_knows_that_rows_have_steps_of_their_own():
    """What is rounded to them is what the same weight, its rows divided by their share, is with one step."""
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(6, 6))
    of_columns, of_rows = np.eye(12) + 0.5, torch.from_numpy(factor @ factor.T)
    feedback = make_feedback([(np.arange(12), torch.from_numpy(of_columns))], of_rows=of_rows)
    weight, shares = torch.from_numpy(generator.normal(size=(6, 12))), np.exp2(generator.integers(-2, 3, 6))
    scaled = weight / torch.from_numpy(shares)[:, None]
    stored = rounding.encode({"w": weight}, {"w": 0.25 * shares[:, None]}, {"w": feedback})
    expected = rounding.encode({"w": scaled}, {"w": 0.25}, {"w": feedback.with_scales(shares)})
    found, expected = (entropy.decode(of, {"w": weight.shape})["w"].numpy() for of in (stored, expected))
    assert np.array_equal(found, expected * shares[:, None])
    plain = entropy.decode(rounding.encode({"w": weight}, {"w": 0.25 * shares[:, None]}), {"w": weight.shape})["w"]
    assert not np.array_equal(found, plain.numpy())


def test_a_fit_to_a_size_keeps_the_ratios_of_steps():
    weight = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    ratios = steps_of(np.exp2(np.arange(8) / 4), dimensions=2)

    def size(stored):
        return sum(part.nbytes for part in stored.values())

    stored = allocation.entropy_coded({"w": weight}, {"w": 1.0}, size, 1200, ratios={"w": ratios})
    assert 0.97 * 1200 < size(stored) <= 1200
    found = entropy.steps_of(stored, {"w": weight.shape})["w"]
    assert np.allclose(found / found[0], ratios / ratios[0], rtol=1e-6)


def test_a_file_of_steps_by_rows_is_extended_without_a_change():
    stored = rounding.encode(weights(), random_steps(), price=0.0)
    shapes = shapes_of(weights())
    extended = entropy.extend(stored, shapes, {"more": np.array([[3, -2]])}, {"more": 0.5})
    decoded, former = entropy.decode(extended, shapes | {"more": torch.Size([1, 2])}), entropy.decode(stored, shapes)
    assert decoded["more"].tolist() == [[1.5, -1.0]]
    assert all(torch.equal(decoded[name], former[name]) for name in shapes)


def test_a_trellis_and_steps_by_rows_stand_beside_each_other():
    codes = {"w": np.random.default_rng(0).integers(-3, 4, (9, 20))}
    steps = stored_steps(steps_of(np.exp2(np.arange(9) / 8), dimensions=2))
    both, plain = (entropy.encode(codes, {"w": step}, {"w": 0}) for step in (steps, 1.0))
    assert both["entropy:layout"].tolist() == [4]
    shapes = {"w": torch.Size([9, 20])}
    assert np.array_equal(entropy.decode(both, shapes)["w"], entropy.decode(plain, shapes)["w"].numpy() * steps)


def test_steps_by_rows_that_are_all_the_same_say_what_one_step_says():
    rows = {"conv": np.full((8, 1, 1, 1), 0.1, np.float32), "up": 0.2, "bias": 0.01}
    one = rounding.encode(weights(), rows | {"conv": 0.1}, price=0.0)
    assert entropy.version_of(one) == 2
    same = entropy.decode(rounding.encode(weights(), rows, price=0.0), shapes_of(weights()))
    assert all(torch.equal(same[name], of) for name, of in entropy.decode(one, shapes_of(weights())).items())


def test_rounding_to_a_size_keeps_the_steps_by_rows():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    steps = stored_steps(steps_of(0.01 * np.exp2(np.arange(64) % 5 / 8), dimensions=2))

    def size(stored):
        return sum(part.nbytes for part in stored.values())

    stored = allocation.requantize_to_size({"w": weight}, {"w": steps}, size, 1100)
    assert 0.98 * 1100 < size(stored) <= 1100
    found = entropy.steps_of(stored, {"w": weight.shape})["w"]
    assert np.allclose(found / found[0], steps / steps[0], rtol=1e-6)


@pytest.mark.parametrize("exponents, message", [([LARGEST_EXPONENT + 1, 0], "exponent of 513"), ([512, 0], "positive")])
def test_steps_that_cannot_be_are_refused(exponents, message):
    with pytest.raises(ValueError, match=message):
        join(1e38, np.array(exponents), 0, 2)
