"""Rounding that looks at its neighbours: the error of each column is made good by the columns still to be rounded.

A layer's output is its weight, a matrix of rows, times the patches of its input. Where patches are alike, the error of
one entry can be undone by others. The second moment of the patches says how: successive rounding with the Cholesky
factor of its inverse (Frantar et al. 2023, "GPTQ", algorithm 1).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.fisher.gradients import SampleLoss, is_plain_convolution, visit_layers

DAMPING = 0.01  # of the mean second moment, added to each: directions that no sample showed cost something too
BLOCK = 64  # columns whose errors are handed on together
CHUNK = 16  # samples


@dataclass(frozen=True)
class Feedback:
    """For one weight: the order in which columns are rounded, and the upper Cholesky factor (K, K) of the inverse of
    the damped second moment in that order; `transposed`: of a transposed convolution; `gain`: the squared error of the
    output, as a share of what it is where each entry is rounded by itself with the same step."""

    order: np.ndarray
    upper: np.ndarray
    transposed: bool
    gain: float

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (output channels, K), to be multiplied with patches (K,) of the input."""
        return weight.transpose(0, 1).flip(2, 3).flatten(1) if self.transposed else weight.flatten(1)

    def weight(self, rows: np.ndarray, shape: torch.Size) -> np.ndarray:
        """`rows` as the weight of `shape` that they were."""
        if not self.transposed:
            return rows.reshape(shape)
        inputs, outputs, *kernel = shape
        return rows.reshape(outputs, inputs, *kernel)[:, :, ::-1, ::-1].swapaxes(0, 1)

    def round(self, rows: np.ndarray, bits: Callable[[np.ndarray], np.ndarray], price: float) -> np.ndarray:
        """Integers (R, K) for `rows` (R, K), which are in units of the step.

        bits: the length of each code; price: of a bit, in units of a mean column's squared error.
        """
        size = rows.shape[1]
        rest, codes = rows[:, self.order].astype(np.float64), np.empty(rows.shape, np.int64)
        costs = 1 / np.square(self.upper.diagonal().astype(np.float64))
        price = price * costs.mean()
        for start in range(0, size, BLOCK):
            end = min(size, start + BLOCK)
            errors = np.empty((len(rest), end - start))
            for j in range(start, end):
                column = rest[:, j]
                code = toward_zero(column, np.rint(column).astype(np.int64), bits, price / costs[j])
                error = (column - code) / self.upper[j, j]
                rest[:, j + 1 : end] -= np.outer(error, self.upper[j, j + 1 : end])
                codes[:, self.order[j]], errors[:, j - start] = code, error
            rest[:, end:] -= errors @ self.upper[start:end, end:]
        return codes


def toward_zero(
    scaled: np.ndarray, codes: np.ndarray, bits: Callable[[np.ndarray], np.ndarray], price: float
) -> np.ndarray:
    """`codes`, or the next toward zero where its fewer bits pay for its squared error (rate-distortion optimised
    quantization, Sullivan & Wiegand 1998)."""
    lower = codes - np.sign(codes)
    gain = (scaled - lower) ** 2 - (scaled - codes) ** 2 + price * (bits(lower) - bits(codes))
    return np.where((gain < 0) & (abs(scaled - lower) < 1), lower, codes)


def make_feedback(moment: torch.Tensor, transposed: bool = False) -> Feedback:
    """Of the second moment (K, K) of a layer's patches."""
    matrix = moment.double().cpu().numpy()
    order = np.argsort(-matrix.diagonal(), kind="stable")
    damping = DAMPING * (matrix.diagonal().mean() or 1.0)
    matrix = matrix[np.ix_(order, order)] + damping * np.eye(len(matrix))
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    gain = (1 / upper.diagonal() ** 2).mean() / matrix.diagonal().mean()
    return Feedback(order, upper.astype(np.float32), transposed, float(gain))


def measure_feedback(network: nn.Module, loss: SampleLoss, samples: tuple[torch.Tensor, ...]) -> dict[str, Feedback]:
    """{weight: Feedback} of the linear layers and the plain convolutions of `network` that the loss calls.

    Each patch counts by the squared gradient of the sample's loss at the output that it makes, so that places and
    samples that do not matter do not decide. Every process measures all: a sum of other parts would round otherwise.
    """
    layers = {name: module for name, module in network.named_modules() if _has_patches(module)}
    moments: dict[str, torch.Tensor] = {}

    def visit(name: str, layer: nn.Module, x: torch.Tensor, g: torch.Tensor, calls_left: int) -> None:
        patches, gradients = patches_of(layer, x), _places_last(layer, g)
        weighted = patches * gradients.square().sum(1, keepdim=True).sqrt()
        flat = weighted.transpose(1, 2).flatten(0, 1)  # (N L, K)
        moments[name] = moments.get(name, 0) + flat.T @ flat

    for start in tqdm(range(0, len(samples[0]), CHUNK), desc="moments", unit="batch"):
        visit_layers(network, layers, loss, tuple(s[start : start + CHUNK] for s in samples), visit)
    return {
        f"{name}.weight": make_feedback(moment, isinstance(layers[name], nn.ConvTranspose2d))
        for name, moment in tqdm(moments.items(), desc="factors", unit="layer")
    }


def _has_patches(layer: nn.Module) -> bool:
    """Whether `patches_of` knows the layer."""
    if isinstance(layer, nn.ConvTranspose2d) and (layer.dilation != (1, 1) or layer.output_padding != (0, 0)):
        return False
    return isinstance(layer, nn.Linear) or (is_plain_convolution(layer) and layer.groups == 1)


def patches_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N, K, L): the patch of the input that makes each of the layer's L outputs, in the order of `Feedback.rows`."""
    if isinstance(layer, nn.Linear):
        return _places_last(layer, x)
    if isinstance(layer, nn.Conv2d):
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    n, channels, height, width = x.shape
    down, right = layer.stride
    spread = x.new_zeros(n, channels, down * (height - 1) + 1, right * (width - 1) + 1)
    spread[:, :, ::down, ::right] = x
    padding = [k - 1 - p for k, p in zip(layer.kernel_size, layer.padding, strict=True)]
    return F.unfold(spread, layer.kernel_size, padding=padding)


def _places_last(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N, C, L)"""
    return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2) if isinstance(layer, nn.Linear) else x.flatten(2)
