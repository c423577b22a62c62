"""Distances to the nearest training digit, of images that are copies, and of images that are known."""

import itertools
from dataclasses import replace

import conftest
import numpy as np
import pytest
import torch

from common.metrics import memorised
from common.metrics.memorised import excess_of_training, median_and_error, nearest
from common.runtime import sealed
from common.study.memorised import compared_with_training, format_nearest
from common.study.rows import BASELINE, REAL, Figure, ResultStore, Row, row_from_json

SETTINGS = replace(conftest.SETTINGS, images=5)
ROW = Row("u", SETTINGS, fid=Figure(1, 0.1), kid=Figure(0, 0), inception_score=Figure(1, 0), strategy="Uniform")


def some_images(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 32, 32), generator=generator).to(torch.uint8)


def test_copies_are_at_no_distance():
    digits = some_images(20, 0)
    distances, indices = nearest(digits[[3, 19, 3]], digits)
    assert distances.tolist() == [0, 0, 0] and indices.tolist() == [3, 19, 3]


def test_distances_are_those_of_pixels_of_0_to_1(monkeypatch):
    monkeypatch.setattr(memorised, "CHUNK", 7)  # neither number is a multiple of it
    images, digits = some_images(16, 1), some_images(30, 2)
    apart = (images.double()[:, None] / 255 - digits.double()[None] / 255).flatten(2).norm(dim=2)  # (16, 30)
    distances, indices = nearest(images, digits)
    np.testing.assert_allclose(distances, apart.min(1).values)
    assert indices.tolist() == apart.min(1).indices.tolist() and max(indices) > 7


def test_of_two_far_clusters_the_near_one_counts():
    # Black and white digits, whose pixels are 1 apart: sqrt(1024) = 32. One pixel of the full range is 1.
    digits = torch.stack([torch.zeros(32, 32), torch.full((32, 32), 255.0)]).to(torch.uint8)
    images = digits.clone()
    images[0, 0, 0], images[1, 0, 0] = 255, 0
    distances, indices = nearest(images, digits)
    assert distances.tolist() == [1.0, 1.0] and indices.tolist() == [0, 1]
    assert nearest(digits[:1], digits[1:])[0].tolist() == [32.0]


@pytest.mark.parametrize("n", [100, 101])
def test_error_of_the_median_is_that_of_the_bootstrap(n):
    rng = np.random.default_rng(0)
    values = rng.gamma(5, size=n)
    median, error = median_and_error(values)
    draws = np.median(rng.choice(values, size=(20_000, n)), axis=1)
    assert median == np.median(values)
    assert error == pytest.approx(draws.std(), rel=0.06)


def test_error_of_the_median_of_normal_values():
    errors = [median_and_error(np.random.default_rng(seed).normal(size=1000))[1] for seed in range(50)]
    assert np.mean(errors) == pytest.approx((np.pi / 2 / 1000) ** 0.5, rel=0.05)  # known for large samples


def test_rows_of_the_baseline_and_of_real_digits_say_it(tmp_path):
    training, held_out, generated = some_images(20, 0), some_images(5, 1), some_images(5, 0)
    sealed.save(tmp_path / "images.safetensors", "images", {"images": generated}, {})
    baseline = replace(ROW, label="b", strategy=BASELINE, image_file=str(tmp_path / "images.safetensors"))
    real, other = replace(ROW, label="r", strategy=REAL), replace(ROW, strategy="Uniform")
    real, baseline, same = compared_with_training([real, baseline, other], training, held_out, "cpu")
    assert same == other and real.training_digit_excess is None
    assert real.nearest_training_digit.value == np.median(nearest(held_out, training)[0]) > 5
    assert baseline.nearest_training_digit == Figure(0.0, 0.0)  # these images are copies
    assert baseline.training_digit_excess.value == pytest.approx(0.2)
    said = format_nearest([real, baseline, same])
    assert f"generated 0.00 ± 0.00, held-out {real.nearest_training_digit.text(2)}." in said
    assert "by 20.0 ± " in said
    assert format_nearest([real, same]) == "" and "held-out 1" not in format_nearest([baseline])
    assert row_from_json(baseline.to_json()) == baseline and row_from_json(real.to_json()) == real

    store = ResultStore(tmp_path / "results.jsonl")
    store.add([baseline, real])
    without = [replace(row, nearest_training_digit=None, training_digit_excess=None) for row in (baseline, real)]
    store.add(without)  # of a command that does not measure it
    assert store.rows() == [baseline, real]


def test_excess_of_known_indices():
    # 8 training digits of 10, and images that copy them: 20 points more than by their number.
    excess, error = excess_of_training(np.array([0, 1, 2, 3]), 8, 10)
    assert excess == pytest.approx(0.2)
    counts = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    sums = [sum(counts[i] for i in range(10) if i not in out) / 4 for out in itertools.combinations(range(10), 2)]
    assert error == pytest.approx(np.std(sums))  # over all 45 choices of the two that are held out
    assert excess_of_training(np.array([0, 8, 8, 9]), 8, 10)[0] == pytest.approx(0.25 - 0.8)


def test_excess_of_a_generator_that_knows_no_digit_lies_within_its_error():
    # Few images and digits of two pixels: some digits are the nearest of many images.
    generator, ratios = torch.Generator().manual_seed(0), []
    for _ in range(300):
        images, digits = (torch.randint(256, (n, 1, 2), generator=generator).to(torch.uint8) for n in (80, 50))
        excess, error = excess_of_training(nearest(images, digits)[1], 40, 50)
        ratios.append(excess / error)
    assert abs(np.mean(ratios)) < 0.2
    assert np.std(ratios) == pytest.approx(1, abs=0.15)
    excess, error = excess_of_training(nearest(digits[:40], digits)[1], 40, 50)  # copies
    assert excess > 2 * error
