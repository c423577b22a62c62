"""What it costs to take a layer's products in 8 bits, by Gauss-Newton values: which layers must stay in bfloat16.

A layer's output z is off by dz where its input and its weight are those of 8 bits. To second order the mean squared
error of the network's P outputs grows by the mean over outputs of (d output_p / d z . dz)^2, the Gauss-Newton form of
`common.fisher.gauss_newton` in the direction dz. One backward pass for each image, with random signs, estimates it for
all layers. Errors at a timestep weigh as they do in the finished image.
"""

from copy import deepcopy

import torch
from torch import nn

from common.ddpm.architecture import schedule_of
from common.engines.integers import integer_layers, layer_operations
from common.fisher.gauss_newton import random_signs, signed_sum
from common.fisher.gradients import visit_layers

IMAGES = 128
BATCH = 16
SEED = 0
SHARE = 0.9  # of the predicted error, which the layers that are left in bfloat16 would bring


def layer_costs(network: nn.Module, graph, x: torch.Tensor, t: torch.Tensor, variance: float) -> dict[str, float]:
    """{layer: predicted increase of the squared error of the predicted noise, in the mean over pixels}, the largest
    first, of each layer of 8 bits in `graph`, on images x (N, C, H, W) noised to timesteps t (N,).

    The mean over images is weighed by `Schedule.image_weights` of images of this `variance`.
    """
    network, ranges = network.cpu().float(), input_ranges(graph)
    layers = {name: network.get_submodule(name) for name in integer_layers(graph) if name in ranges}
    exact = deepcopy(layers)  # which can be called without being watched
    coarse = with_weights(layers, dequantized_weights(graph))
    x, t = x[:IMAGES], t[:IMAGES]
    importance = torch.tensor(schedule_of(network.architecture).image_weights(t.tolist(), variance))
    signs, costs = random_signs(tuple(x.shape), SEED), dict.fromkeys(layers, 0.0)
    loss = signed_sum(lambda call, x, t: call(x, t))
    for start in range(0, len(x), BATCH):
        part = slice(start, start + BATCH)

        def visit(name, layer, a, g, calls_left, part=part):
            error = coarse[name](fake_quantized(a, *ranges[name])) - exact[name](a)
            along = (g * error).flatten(1).sum(1).double()  # (N,)
            costs[name] += float((along.square() * importance[part]).sum() / importance.sum())

        visit_layers(network, layers, loss, (x[part], t[part], signs[part]), visit)
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def with_weights(layers: dict[str, nn.Module], weights: dict[str, torch.Tensor]) -> dict[str, nn.Module]:
    """Copies of the layers that have these weights."""
    copies = deepcopy(layers)
    for name, copy in copies.items():
        copy.weight.data.copy_(weights[name])
    return copies


def most_costly(costs: dict[str, float], share: float = SHARE) -> list[str]:
    """The fewest layers that bring at least `share` of the predicted error of all; `costs` begins with the largest."""
    chosen, left = [], sum(costs.values()) * (1 - share)
    remaining = sum(costs.values())
    for name in costs:
        if remaining <= left:
            break
        chosen.append(name)
        remaining -= costs[name]
    return chosen


def input_ranges(graph) -> dict[str, tuple[float, float, int]]:
    """{layer: (lowest, highest, number of levels) of its input}"""
    found = {}
    for name, operation in layer_operations(graph).items():
        node = operation.input_value(0).get_node()
        if node.get_type_name() == "FakeQuantize":
            low, high = (float(node.input_value(i).get_node().data.reshape(-1)[0]) for i in (1, 2))
            found[name] = low, high, node.get_attributes()["levels"]
    return found


def dequantized_weights(graph) -> dict[str, torch.Tensor]:
    """{layer: the FP32 weight that its codes stand for}"""
    return {
        name: torch.from_numpy(codes.data.astype("float32") * scale.data)
        for name, (codes, _, scale, _) in integer_layers(graph).items()
    }


def fake_quantized(a: torch.Tensor, low: float, high: float, levels: int) -> torch.Tensor:
    """`a` rounded to the nearest of so many levels from `low` to `high`."""
    step = (high - low) / (levels - 1)
    return ((a.clamp(low, high) - low) / step).round() * step + low
