"""FID, KID, score and PSNR against other libraries and closed forms; their errors against redrawing."""

import errno
import itertools
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from common.ddpm.digits import load_digits, pad_digits
from common.errors import UserError, run_main
from common.metrics import frechet, scores
from common.metrics.estimate import Estimate
from common.metrics.features import CLASSIFIER_SHA256, load_features
from common.metrics.frechet import Reference, fid, symmetric_root
from common.metrics.scores import (
    inception_score,
    kid,
    load_reference,
    make_reference,
    psnr,
    require_enough,
    squared_errors,
)
from common.runtime import sealed
from common.study import score_folder
from common.study.score_folder import load_folder


def correlated(n, dimensions, seed, shift=0.0, scale=1.0):
    """(n, dimensions) of a Gaussian whose covariance depends on `dimensions` alone, moved and widened."""
    mixing = np.random.default_rng(99).normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    return np.random.default_rng(seed).normal(size=(n, dimensions)) @ mixing * scale + shift


def moments(features):
    return features.mean(0), np.cov(features, rowvar=False)


# Frechet distance


@pytest.mark.parametrize("dimensions", [2, 16, 64])
def test_fid_equals_pytorch_fid(dimensions):
    a, b = correlated(300, dimensions, 1, shift=0.2, scale=1.3), correlated(500, dimensions, 2) ** 2
    expected = calculate_frechet_distance(*moments(a), *moments(b))
    assert expected > 0.1
    assert fid(a, make_reference(b)).value == pytest.approx(expected, rel=1e-6)
    assert fid(b, make_reference(a)).value == pytest.approx(expected, rel=1e-6)


def test_fid_of_features_of_known_moments():
    # |m1 - m2|^2 + sum (s1 - s2)^2 = (9 + 16) + (1 + 4 + 0) = 30.
    mean1, mean2 = np.array([3.0, 0.0, 1.0]), np.array([0.0, 4.0, 1.0])
    deviation1, deviation2 = np.array([2.0, 1.0, 5.0]), np.array([1.0, 3.0, 5.0])
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=3))) * np.sqrt(7 / 8)  # of variance one
    value = fid(mean1 + deviation1 * corners, make_reference(mean2 + deviation2 * corners)).value
    assert value == pytest.approx(30.0, rel=1e-12)


def test_fid_of_features_to_themselves_is_zero():
    features = correlated(300, 16, 1)
    assert abs(fid(features, make_reference(features)).value) < 1e-10 * np.trace(moments(features)[1])


def test_symmetric_root():
    covariance = np.cov(correlated(300, 16, 1), rowvar=False)
    root = symmetric_root(covariance)
    np.testing.assert_allclose(root @ root, covariance, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(root, root.T, rtol=1e-10, atol=1e-12)
    assert np.linalg.eigvalsh(root).min() > 0


def test_fid_with_features_that_are_constant():
    # A feature that never fires, as a ReLU's may, has no variance in either set.
    features, real = correlated(300, 5, 1, shift=0.2), correlated(500, 5, 2)
    expected = fid(features, make_reference(real))
    features, real = (np.insert(f, 2, 0.0, axis=1) for f in (features, real))
    measured = fid(features, make_reference(real))
    assert measured.value == pytest.approx(expected.value, rel=1e-6)
    assert measured.error == pytest.approx(expected.error, rel=1e-6)


# KID and score


@pytest.mark.parametrize("size", [40, 700])  # 700 takes more than one chunk
def test_kid_equals_torch_fidelity(size):
    features, real = correlated(size, 12, 1, shift=0.3), correlated(size, 12, 2)
    expected = kernel_mmd(
        features, real, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1
    )
    assert kid(features, make_reference(real)).value == pytest.approx(expected, rel=1e-9)


def test_kid_of_sets_of_different_sizes_by_hand():
    # One dimension, kernel (xy + 1)^3; images 0, 1; digits 0, 1, 2.
    # Within images k(0, 1) = 1; within digits (1 + 1 + 27) / 3; across (1 + 1 + 1 + 1 + 8 + 27) / 6.
    features, real = np.array([[0.0], [1.0]]), np.array([[0.0], [1.0], [2.0]])
    reference = Reference(real.mean(0), np.eye(1), np.eye(1), real, kernel_mean=29 / 3)
    assert kid(features, reference).value == pytest.approx(1 + 29 / 3 - 2 * 39 / 6, rel=1e-12)


def test_kernel_mean_of_the_reference_by_hand():
    # Two dimensions, kernel (x.y / 2 + 1)^3: pairs of different digits give 1, 1 and (1 + 1)^3.
    reference = make_reference(np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]))
    assert reference.kernel_mean == pytest.approx((1 + 1 + 8) / 3, rel=1e-12)


def test_kid_of_the_same_distribution_is_zero_within_its_error():
    estimate = kid(correlated(1500, 6, 1), make_reference(correlated(1500, 6, 2)))
    assert abs(estimate.value) < 5 * estimate.error


def test_large_reference_is_sampled_for_kid(monkeypatch):
    monkeypatch.setattr(scores, "KID_REFERENCE", 50)
    real = correlated(200, 4, 1)
    reference = make_reference(real)
    assert reference.sample.shape == (50, 4)
    assert len(np.unique(reference.sample[:, 0])) == 50 and set(reference.sample[:, 0]) <= set(real[:, 0])
    np.testing.assert_array_equal(reference.mean, real.mean(0))  # the moments are those of all digits


def logits(n, seed=1, classes=10):
    return 3 * torch.randn(n, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_score_equals_torch_fidelity():
    expected = isc_features_to_metric(logits(400), splits=1, shuffle=False)["inception_score_mean"]
    assert 2 < expected < 10
    assert inception_score(logits(400).softmax(1).numpy()).value == pytest.approx(expected, rel=1e-12)


def test_score_by_hand():
    # Ten classes, each certain and equally frequent: exp(log 10). One answer for all images: exp(0).
    assert inception_score(np.tile(np.eye(10), (3, 1))).value == pytest.approx(10.0, rel=1e-12)
    assert inception_score(np.full((30, 10), 0.1)).value == pytest.approx(1.0, rel=1e-12)


# PSNR


def test_psnr_of_a_constant_difference():
    # Mean squared error 100: 10 log10(255^2 / 100) = 28.1308 dB.
    low, high = torch.full((3, 32, 32), 100, dtype=torch.uint8), torch.full((3, 32, 32), 110, dtype=torch.uint8)
    assert psnr(squared_errors(low, high)) == (pytest.approx(28.1308, abs=1e-4), 0.0)
    assert psnr(squared_errors(high, low)) == (pytest.approx(28.1308, abs=1e-4), 0.0)
    black, white = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((3, 32, 32), 255, dtype=torch.uint8)
    assert psnr(squared_errors(black, white)) == (pytest.approx(0.0, abs=1e-12), 0.0)


def test_psnr_averages_the_squared_error_over_images():
    # Squared errors 0 and 200: their mean is 100. Averaged decibels would be infinite.
    a = torch.full((1200, 32, 32), 50, dtype=torch.uint8)
    b = a.clone()
    b[::2, :16, :] += 20
    value, error = psnr(squared_errors(a, b))
    assert value == pytest.approx(28.1308, abs=1e-4)
    # Error of the mean: 100 * sqrt(1200 / 1199) / sqrt(1200); in decibels 10 / ln 10 times its share of the mean.
    assert error == pytest.approx(10 / np.log(10) / np.sqrt(1199), rel=1e-9)


def test_psnr_of_equal_images_is_infinite():
    images = torch.randint(256, (5, 32, 32), dtype=torch.uint8)
    assert psnr(squared_errors(images, images.clone())) == (float("inf"), 0.0)


# Errors

N, DIMENSIONS, RESAMPLES = 1500, 6, 400


def draws(n=N):
    """How often each image was drawn in each of the bootstrap's resamples: (RESAMPLES, n)."""
    return np.random.default_rng(3).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)


def resamples(statistic, n=N):
    """Values of statistic(counts) over the resamples; counts (n,)."""
    return np.array([statistic(counts) for counts in draws(n)])


def kid_of_counts(features, reference):
    """KID as a function of how often each image was drawn, counts (R, n); no image is paired with its own copies."""

    def kernel(a, b):
        return (a @ b.T / DIMENSIONS + 1) ** 3

    within = kernel(features, features) - np.diag(np.diag(kernel(features, features)))
    across = kernel(features, reference.sample).mean(1)

    def statistic(counts):
        n = counts.shape[1]
        pairs = (counts @ within * counts).sum(1)
        return pairs / (n * (n - 1)) + reference.kernel_mean - 2 * counts @ across / n

    return statistic


@pytest.fixture(scope="module")
def drawn():
    """Features and probabilities of a model, of another that shares most of its luck, and the reference."""
    reference = make_reference(correlated(1000, DIMENSIONS, 2))
    first = correlated(N, DIMENSIONS, 1, shift=0.3, scale=1.2) + np.abs(correlated(N, DIMENSIONS, 4))
    second = first + 0.1 * correlated(N, DIMENSIONS, 5)
    return first, second, reference


def test_error_of_fid_agrees_with_the_bootstrap(drawn):
    features, _, reference = drawn
    values = resamples(lambda counts: fid(np.repeat(features, counts, axis=0), reference).value)
    assert fid(features, reference).error == pytest.approx(values.std(ddof=1), rel=0.1)


def test_error_of_fid_agrees_with_its_closed_form():
    # Independent Gaussian features against known moments: the delta method on the means and deviations gives
    # sum_d s_d^2 (4 (m_d - r_d)^2 + 2 (s_d - q_d)^2) / n.
    n, mean, deviation = 100_000, np.array([0.5, 0.0, -0.2]), np.array([1.0, 2.0, 0.5])
    real_mean, real_deviation = np.zeros(3), np.array([1.5, 1.0, 0.5])
    reference = Reference(real_mean, np.diag(real_deviation**2), np.diag(real_deviation), np.zeros((1, 3)), 0.0)
    features = mean + deviation * np.random.default_rng(6).normal(size=(n, 3))
    terms = deviation**2 * (4 * (mean - real_mean) ** 2 + 2 * (deviation - real_deviation) ** 2)
    assert fid(features, reference).error == pytest.approx(np.sqrt(terms.sum() / n), rel=0.02)


def test_error_of_kid_agrees_with_the_bootstrap(drawn):
    features, _, reference = drawn
    statistic = kid_of_counts(features, reference)
    assert statistic(np.ones((1, N))) == pytest.approx(kid(features, reference).value, rel=1e-9)
    assert kid(features, reference).error == pytest.approx(statistic(draws()).std(ddof=1), rel=0.1)


def test_error_of_score_agrees_with_the_bootstrap():
    probabilities = logits(N).softmax(1).numpy()
    values = resamples(lambda counts: inception_score(np.repeat(probabilities, counts, axis=0)).value)
    assert inception_score(probabilities).error == pytest.approx(values.std(ddof=1), rel=0.1)


def test_error_of_psnr_agrees_with_the_bootstrap():
    generator = torch.Generator().manual_seed(7)
    a = torch.full((400, 2, 2), 100, dtype=torch.uint8)  # small, for speed
    b = a + torch.randint(60, (400, 1, 1), generator=generator, dtype=torch.uint8)
    squared = squared_errors(a, b)
    values = resamples(lambda counts: psnr(np.repeat(squared, counts))[0], n=400)
    assert psnr(squared_errors(a, b))[1] == pytest.approx(values.std(ddof=1), rel=0.1)


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_error_of_a_difference_is_paired(drawn, name):
    first, second, reference = drawn
    if name == "fid":
        a, b = fid(first, reference), fid(second, reference)
        values = resamples(
            lambda counts: (
                fid(np.repeat(second, counts, axis=0), reference).value
                - fid(np.repeat(first, counts, axis=0), reference).value
            )
        )
    else:
        a, b = kid(first, reference), kid(second, reference)
        of_first, of_second = kid_of_counts(first, reference), kid_of_counts(second, reference)
        values = of_second(draws()) - of_first(draws())
    difference, error = b.minus(a)
    assert difference == b.value - a.value != 0
    assert error == pytest.approx(values.std(ddof=1), rel=0.1)
    assert error < 0.3 * np.hypot(a.error, b.error)


def test_difference_to_itself_has_no_error(drawn):
    estimate = fid(drawn[0], drawn[2])
    assert estimate.minus(estimate) == (0.0, 0.0)


def test_influences_have_mean_zero(drawn):
    features, _, reference = drawn
    estimates = fid(features, reference), kid(features, reference), inception_score(logits(N).softmax(1).numpy())
    for estimate in estimates:
        assert estimate.influence.shape == (N,)
        assert abs(estimate.influence.mean()) < 1e-10 * estimate.influence.std()


def test_standard_error_by_hand():
    # Deviations -3, -1, 1, 3: variance 20 / 3, over n = 4.
    assert Estimate(0.0, np.array([-3.0, -1.0, 1.0, 3.0])).error == pytest.approx(np.sqrt(20 / 3 / 4), rel=1e-12)


# Images and reference


class FourFeatures:
    """Means of the quarters of an image, in place of a network."""

    name, dimensions, sha256 = "mnist", 4, "a" * 64
    calls = 0

    def extract(self, images):
        type(self).calls += 1
        quarters = images.double().unflatten(1, (2, 16)).unflatten(3, (2, 16)).mean((2, 4)).flatten(1) / 255
        return quarters.float(), quarters.softmax(1)


@pytest.fixture
def digits():
    return torch.randint(256, (60, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))


def test_reference_is_kept_and_reused(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(FourFeatures, "calls", 0)
    first = load_reference(digits, FourFeatures(), tmp_path)
    again = load_reference(digits, FourFeatures(), tmp_path)
    assert FourFeatures.calls == 1
    fresh = make_reference(FourFeatures().extract(digits)[0].numpy())
    for reference in (first, again):
        assert vars(reference).keys() == vars(fresh).keys()
        for key, value in vars(fresh).items():
            np.testing.assert_array_equal(getattr(reference, key), value)


def test_reference_is_of_these_digits_and_this_network(tmp_path, digits, monkeypatch):
    load_reference(digits, FourFeatures(), tmp_path)
    changed = digits.clone()
    changed[3, 4, 5] ^= 1
    other = load_reference(changed, FourFeatures(), tmp_path)
    np.testing.assert_array_equal(other.mean, FourFeatures().extract(changed)[0].double().numpy().mean(0))
    monkeypatch.setattr(FourFeatures, "sha256", "b" * 64)
    monkeypatch.setattr(FourFeatures, "calls", 0)
    load_reference(digits, FourFeatures(), tmp_path)
    assert FourFeatures.calls == 1
    assert len(list(tmp_path.iterdir())) == 3


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def edit(**changes):
    """Seals the file again with some of its tensors or numbers replaced, or left out where they are None."""

    def apply(path):
        tensors, metadata = sealed.load(path, "reference")
        changed = {k: v for k, v in (tensors | metadata | changes).items() if v is not None}
        tensors = {k: v for k, v in changed.items() if isinstance(v, torch.Tensor)}
        sealed.save(path, "reference", tensors, {k: v for k, v in changed.items() if k not in tensors})

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(b""),
        lambda path: sealed.save(path, "images", {}, {}),
        edit(mean=None),
        edit(more=torch.zeros(1)),
        edit(mean=torch.zeros(5, dtype=torch.float64)),
        edit(sample=torch.zeros(59, 4)),
        edit(covariance=torch.zeros(4, 4)),
        edit(covariance_root=torch.zeros(4, 4, dtype=torch.bfloat16)),
        edit(covariance=torch.full((4, 4), float("nan"), dtype=torch.float64)),
        edit(kernel_mean=None),
        edit(kernel_mean=float("inf")),
        edit(kernel_mean="1.0"),
        edit(kernel_mean=10**400),
    ],
)
def test_damaged_reference_is_made_anew(tmp_path, digits, capsys, damage):
    load_reference(digits, FourFeatures(), tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    assert capsys.readouterr().err == ""
    damage(path)
    reference = load_reference(digits, FourFeatures(), tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "made anew" in line
    assert path.read_bytes() == content
    np.testing.assert_array_equal(reference.mean, FourFeatures().extract(digits)[0].double().numpy().mean(0))


def test_extract_keeps_the_order_over_chunks(monkeypatch, digits):
    monkeypatch.setattr(scores, "CHUNK", 7)
    features, probabilities = scores.extract(digits, FourFeatures())
    np.testing.assert_array_equal(features, FourFeatures().extract(digits)[0].numpy())
    assert probabilities.shape == (60, 4)


def test_require_enough_says_how_many():
    require_enough(5, FourFeatures())
    with pytest.raises(UserError) as error:
        require_enough(4, FourFeatures())
    assert "4 images" in str(error.value) and "at least 5" in str(error.value) and "--images" in str(error.value)


def test_score_of_too_few_images_is_refused(digits):
    reference = make_reference(FourFeatures().extract(digits)[0].numpy())
    with pytest.raises(UserError, match="at least 5"):
        scores.score(digits[:4], FourFeatures(), reference)


def save(path, pixels):
    Image.fromarray(pixels.numpy()).save(path)


def test_folder_is_read_in_the_order_of_names(tmp_path):
    small = torch.randint(256, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    large = torch.randint(256, (32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(10))
    save(tmp_path / "b.png", small)
    save(tmp_path / "c.PNG", large)
    save(tmp_path / "a.bmp", large.flip(0))
    Image.fromarray(large.numpy()).convert("RGB").save(tmp_path / "d.png")
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_folder(tmp_path)
    assert images.dtype == torch.uint8 and images.shape == (4, 32, 32)
    assert torch.equal(images[0], large.flip(0))
    assert torch.equal(images[1], pad_digits(small)) and torch.equal(images[1][2:30, 2:30], small)
    assert images[1][:2].max() == images[1][:, 30:].max() == 0
    assert torch.equal(images[2], large) and torch.equal(images[3], large)


def test_folder_of_another_size_is_refused(tmp_path):
    save(tmp_path / "a.png", torch.zeros(28, 28, dtype=torch.uint8))
    save(tmp_path / "b.png", torch.zeros(28, 30, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"b\.png is 30x28; .*28x28 or 32x32"):
        load_folder(tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder, said in (
        (tmp_path, "no images"),
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "a.txt", "is a file, not a folder"),
        (tmp_path / "loop", "cannot be read (Too many levels of symbolic links)"),
    ):
        with pytest.raises(UserError) as error:
            load_folder(folder)
        assert str(folder) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def forbid(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "iterdir", forbid)  # root may read any folder
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); name another folder"):
        load_folder(tmp_path)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width, height, *more):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(33 * 32)))
    return b"\x89PNG\r\n\x1a\n" + b"".join((header, *more, body)) + chunk(b"IEND", b"")


@pytest.fixture
def one_png(tmp_path):
    """The bytes of a good file, and that it is good."""
    save(tmp_path / "a.png", torch.randint(256, (32, 32), dtype=torch.uint8))
    assert len(load_folder(tmp_path)) == 1
    return (tmp_path / "a.png").read_bytes()


def refused_as(path, said):
    with pytest.raises(UserError) as error:
        load_folder(path.parent)
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"text", "not a readable image"),
        (lambda content: b"", "not a readable image"),
        (lambda content: content[: len(content) // 2], "not a readable image"),
        (lambda content: content[:50] + bytes(len(content) - 50), "not a readable image"),
        (lambda content: png_of_size(32, 32, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))), "too large"),
        (lambda content: png_of_size(20_000, 20_000), "28x28 or 32x32"),  # Pillow refuses
        (lambda content: png_of_size(10_000, 10_000), "is 10000x10000"),  # Pillow warns
        (lambda content: content + bytes(2**24), "larger than 16 MiB"),
        (lambda content: b"P5 32 32 255\n" + bytes(32 * 32), "not a readable image"),  # a format that is not asked for
    ],
    ids=["text", "empty", "cut", "garbage", "text bomb", "bomb", "smaller bomb", "large file", "pgm"],
)
def test_file_that_is_no_image_is_refused(tmp_path, one_png, recwarn, damage, said):
    (tmp_path / "bad.png").write_bytes(damage(one_png))
    refused_as(tmp_path / "bad.png", said)
    assert not recwarn


def test_size_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_of_size(33, 32))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    refused_as(tmp_path / "a.png", "is 33x32")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "not a file"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.symlink_to("absent"), "a link to none"),
        (lambda path: path.symlink_to(path), "a link to none"),
        (lambda path: path.symlink_to("/dev/zero"), "not a file"),
    ],
    ids=["named pipe", "folder", "broken link", "loop of links", "device"],
)
def test_path_that_is_no_file_is_refused(tmp_path, one_png, make, said):
    make(tmp_path / "bad.png")
    refused_as(tmp_path / "bad.png", said)


def test_image_without_permission_is_refused(tmp_path, one_png, monkeypatch):
    def forbid(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", forbid)  # root may read any file
    refused_as(tmp_path / "a.png", "Permission denied")


def test_sixteen_bits_become_eight(tmp_path):
    # 0..65535 to 0..255, to the nearest: 257 steps each.
    values = np.resize(np.array([0, 128, 129, 256, 257, 300, 32_767, 32_768, 65_406, 65_407, 65_535]), (32, 32))
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    expected = [0, 0, 1, 1, 1, 1, 127, 128, 254, 255, 255]
    assert load_folder(tmp_path)[0].flatten()[:11].tolist() == expected


def test_pictures_are_upright_as_their_camera_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: the first row is on the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_folder(tmp_path)[0], np.rot90(pixels, -1))


def test_one_bit_is_black_or_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2, (32, 32)).astype(bool)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load_folder(tmp_path)[0], pixels * 255)


def with_alpha(mode, alpha):
    return Image.merge(mode, [Image.new("L", (32, 32), 200)] * (len(mode) - 1) + [alpha])


def test_transparent_pixels_are_refused_and_opaque_ones_taken(tmp_path):
    opaque = Image.new("L", (32, 32), 255)
    almost = opaque.copy()
    almost.putpixel((5, 6), 254)
    for mode in ("LA", "RGBA"):
        with_alpha(mode, opaque).save(tmp_path / "a.png")
        assert (load_folder(tmp_path)[0] == 200).all()
        with_alpha(mode, almost).save(tmp_path / "a.png")
        refused_as(tmp_path / "a.png", "transparent")
    Image.new("L", (32, 32), 7).convert("P").save(tmp_path / "a.png", transparency=8)  # of no pixel
    assert (load_folder(tmp_path)[0] == 7).all()
    for mode in ("P", "L", "I;16"):
        grey = Image.new("L", (32, 32), 7)
        (grey if mode == "L" else grey.convert(mode)).save(tmp_path / "a.png", transparency=7)
        refused_as(tmp_path / "a.png", "transparent")


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_file_of_several_pictures_is_refused(tmp_path, ending):
    frames = [Image.new("L", (32, 32), grey) for grey in (0, 250)]
    path = tmp_path / f"a.{ending}"
    frames[0].save(path)
    assert not load_folder(tmp_path).any()
    frames[0].save(path, save_all=True, append_images=frames[1:])
    refused_as(path, "more than one picture")


def run_metrics(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments)])
    run_main(score_folder.main)


def test_main_scores_a_folder(tmp_path, monkeypatch, capsys):
    real, test = load_digits("mnist5k", "train")[::15], load_digits("mnist5k", "test")[:780:3]
    monkeypatch.setattr(score_folder, "load_digits", lambda data, split, data_dir: {"train": real}[split])
    for i, pixels in enumerate(test):
        save(tmp_path / f"{i:03d}.png", pixels[2:30, 2:30])
    run_metrics(monkeypatch, tmp_path, "--device", "cpu")
    printed = capsys.readouterr().out
    network = load_features("mnist", torch.device("cpu"))
    a, b = (scores.extract(images, network)[0] for images in (test, real))
    expected = calculate_frechet_distance(*moments(a), *moments(b))
    assert f"FID {expected:.3f} ± " in printed and "of 260, which compares with as many only" in printed
    assert f"FID {frechet.fid_unbiased(a, make_reference(b)).value:.4f} ± " in printed
    assert f"260 images against 267 digits of mnist5k; mnist features {CLASSIFIER_SHA256[:8]}" in printed


def test_main_refuses_too_few_images(tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / f"{i}.png", torch.zeros(28, 28, dtype=torch.uint8))
    with pytest.raises(SystemExit) as error:
        run_metrics(monkeypatch, tmp_path, "--device", "cpu")
    assert "3 images are too few" in error.value.code and "at least 257" in error.value.code


@pytest.mark.parametrize("light", [False, True])
def test_main_warns_of_digits_that_are_black_on_white(tmp_path, monkeypatch, capsys, light):
    monkeypatch.setattr(score_folder, "load_features", lambda *_: FourFeatures())
    monkeypatch.setattr(score_folder, "load_digits", lambda *_: load_digits("mnist5k", "test"))
    for i, pixels in enumerate(load_digits("mnist5k", "test")[:5]):
        save(tmp_path / f"{i}.png", 255 - pixels if light else pixels)
    run_metrics(monkeypatch, tmp_path, "--device", "cpu")
    error = capsys.readouterr().err
    assert ("invert them" in error and len(error.splitlines()) == 1) if light else error == ""


def test_main_refuses_weights_of_another_metric(tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as error:
        run_metrics(monkeypatch, tmp_path, "--inception-weights", "weights.pth")
    assert "--inception-weights weights.pth: goes with --metric inception only" in error.value.code


@pytest.mark.parametrize("arguments", [[""], [".", "--data-dir", ""], [".", "--inception-weights", ""]])
def test_main_refuses_an_empty_name(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit):
        run_metrics(monkeypatch, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument {arguments[1] if arguments[1:] else 'DIR'}: ''" in line
