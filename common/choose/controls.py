"""What a choice of tensors is to be compared with: other choices that save as many bytes."""

import numpy as np
import torch

from common.presets import FORMATS
from common.runtime.device import derive_seed


def within(order: list[str], savings: dict[str, int], total: int) -> set[str]:
    """Tensors taken in `order`, each that still fits, until together they save at most `total` bytes."""
    chosen = set()
    for name in order:
        if savings[name] <= total:
            chosen.add(name)
            total -= savings[name]
    return chosen


def random_order(names: list[str], seed: int, draw: int) -> list[str]:
    """The names in an order that (seed, draw) decides."""
    return [names[i] for i in np.random.default_rng(derive_seed(seed, "controls", draw)).permutation(len(names))]


def smallest_first(weights: dict[str, torch.Tensor], names: list[str]) -> list[str]:
    """The names by the mean magnitude of their weights."""
    return sorted(names, key=lambda name: float(weights[name].abs().mean()))


def nearest_format(sizes: dict[str, float], size: float) -> str:
    """The format whose uniform model, of sizes {format: MiB}, is nearest to `size`."""
    return min((fmt for fmt in FORMATS if fmt in sizes), key=lambda fmt: abs(sizes[fmt] - size))
