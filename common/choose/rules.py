"""The four published rules: which tensors a threshold on their Fisher values quantizes.

Each takes {name: Fisher value} and returns the names below their threshold.
"""

import math
from statistics import fmean, mean, pstdev

from common.choose.layers import by_layer, is_norm, layer_of, layers_in_order, parse_groups

K_RANGE = (0.1, 2.0)


def below(values: dict[str, float], threshold: float) -> set[str]:
    """Names of the tensors whose Fisher value lies below `threshold`."""
    return {name for name, value in values.items() if value < threshold}


def below_group_mean(values: dict[str, float], groups: str) -> set[str]:
    """Names of the tensors whose Fisher value lies below the mean of their group; `groups` as `parse_groups` reads
    them, in the order of the layers that `values` are of."""
    chosen, layers = set(), layers_in_order(values)
    for group in parse_groups(groups):
        named = {layers[number - 1] for number in group}
        members = {name: value for name, value in values.items() if layer_of(name) in named}
        threshold = mean(members.values())  # exact: a rounded mean can lie above equal values
        chosen |= {name for name, value in members.items() if value < threshold}
    return chosen


def below_top_ratio(values: dict[str, float], ratio: float) -> set[str]:
    """Names of the tensors outside the top `ratio` (0..1) of their layer, counted to the nearest whole tensor, a half
    up; of equal values the earlier tensor stays."""
    chosen = set()
    for members in by_layer(values).values():
        kept = math.floor(ratio * len(members) + 0.5)
        chosen |= set(sorted(members, key=lambda name: -values[name])[kept:])
    return chosen


def below_layer_threshold(values: dict[str, float], alpha: float, k: float | None = None) -> set[str]:
    """Names of the tensors below mean - k * std of their layer, k = alpha * mean / std within K_RANGE unless given.
    Weights of norms are left out: of the means, and of what is chosen."""
    chosen = set()
    for members in by_layer({name: value for name, value in values.items() if not is_norm(name)}).values():
        mean, std = fmean(members.values()), pstdev(members.values())
        if std == 0:
            continue  # equal values: none lies below the others
        factor = k if k is not None else min(max(alpha * mean / std, K_RANGE[0]), K_RANGE[1])
        chosen |= {name for name, value in members.items() if value < mean - factor * std}
    return chosen
