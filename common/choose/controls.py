"""What a choice of tensors is compared with: that by permuted Fisher values, and others that save as many bytes."""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch

from common.presets import FORMATS
from common.runtime.device import derive_seed

LIKE = 4  # a stratum's tensors have at most this many times the entries of its smallest, if more than two do
NEAR = 0.01  # the share of a model's size by which that of a permutation's may differ
TRIES = 2000  # permutations that are drawn, at most, until one is so near


def like_tensors(shapes: dict[str, Sequence[int]]) -> list[list[str]]:
    """The names in strata of like size, vectors (weights of norms, biases) apart from the others.

    A stratum begins with the smallest tensor that is left, and takes those of up to `LIKE` times as many entries. Where
    there is none, it takes the next one, whatever its size; the last tensor, if it is left alone, joins the stratum
    before. Equal sizes would hardly do: they are found within a layer, so that values could not move from layer to
    layer.
    """
    strata = []
    for vectors in (True, False):
        names = sorted((n for n, shape in shapes.items() if (len(shape) < 2) == vectors), key=lambda n: prod(shapes[n]))
        groups: list[list[str]] = []
        for name in names:
            fits = groups and (len(groups[-1]) == 1 or prod(shapes[name]) <= LIKE * prod(shapes[groups[-1][0]]))
            groups[-1].append(name) if fits else groups.append([name])
        if len(groups) > 1 and len(groups[-1]) == 1:
            *groups, before, last = groups
            groups.append(before + last)
        strata += groups
    return strata


def permute(values: dict[str, float], strata: list[list[str]], rng: np.random.Generator) -> dict[str, float]:
    """The values at random among the tensors of each stratum; the names keep their order."""
    moved = {}
    for names in strata:
        moved |= zip(names, (values[names[i]] for i in rng.permutation(len(names))), strict=True)
    return {name: moved[name] for name in values}


def permuted_choice(
    rule: Callable[[dict[str, float]], set[str]],
    values: dict[str, float],
    strata: list[list[str]],
    size: Callable[[set[str]], float],
    rng: np.random.Generator,
) -> set[str]:
    """What the rule chooses by permuted values: the first such choice whose `size` is within `NEAR` of that by the
    values as they are, or the nearest of `TRIES`.

    A draw from the null hypothesis that it makes no difference which tensor of a stratum has which value, given the
    size of the model.
    """
    wanted, nearest, least = size(rule(values)), set(), np.inf
    for _ in range(TRIES):
        chosen = rule(permute(values, strata, rng))
        apart = abs(size(chosen) / wanted - 1)
        if apart < least:
            nearest, least = chosen, apart
        if apart <= NEAR:
            break
    return nearest


def generator_of(seed: int, strategy: str, setting: str, draw: int) -> np.random.Generator:
    """Random numbers of its own for each draw of each row."""
    return np.random.default_rng(derive_seed(seed, "controls", strategy, setting, draw))


def within(order: list[str], savings: dict[str, int], total: int) -> set[str]:
    """Tensors taken in `order`, each that still fits, until together they save at most `total` bytes."""
    chosen = set()
    for name in order:
        if savings[name] <= total:
            chosen.add(name)
            total -= savings[name]
    return chosen


def smallest_first(weights: dict[str, torch.Tensor], names: list[str]) -> list[str]:
    """The names by the mean magnitude of their weights."""
    return sorted(names, key=lambda name: float(weights[name].abs().mean()))


def nearest_format(sizes: dict[str, float], size: float) -> str:
    """The format whose uniform model, of sizes {format: MiB}, is nearest to `size`."""
    return min((fmt for fmt in FORMATS if fmt in sizes), key=lambda fmt: abs(sizes[fmt] - size))
