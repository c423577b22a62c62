"""Rounding that looks at its neighbours: the error of each column is made good by the columns still to be rounded.

A layer's output is its weight, a matrix of rows, times the patches of its input. Where patches are alike, the error of
one entry can be undone by others. The second moment of the patches says how: successive rounding with the Cholesky
factor of its inverse (Frantar et al. 2023, "GPTQ", algorithm 1).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import blas, lapack
from torch import nn
from tqdm import tqdm

from common.fisher.gradients import SampleLoss, is_plain_convolution, visit_layers

DAMPING = 0.01  # of the mean second moment, added to each: directions that no sample showed cost something too
BLOCK = 64  # columns whose errors are handed on together
CHUNK = 16  # samples


@dataclass(frozen=True)
class Factor:
    """For columns that no patch sees together with others: their order of rounding (K,), indices of columns, and the
    upper Cholesky factor (K, K), float32, of the inverse of their damped second moment in that order."""

    order: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class Feedback:
    """For one weight: the factors of its columns; `transposed`: of a transposed convolution; `gain`: the squared error
    of the output, as a share of what it is where each entry is rounded by itself with the same step."""

    factors: list[Factor]
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

    def round(
        self, rows: np.ndarray, bits: Callable[[np.ndarray], np.ndarray], price: float, largest: int | None = None
    ) -> np.ndarray:
        """Integers (R, K) for `rows` (R, K), which are in units of the step.

        bits: the length of each code; price: of a bit, in units of a mean column's squared error; largest: magnitude
        of a code, where codes have an end, and what is cut off there is an error like any other.
        """
        codes = np.empty(rows.shape, np.int64)
        costs = [1 / np.square(factor.upper.diagonal().astype(np.float64)) for factor in self.factors]
        price = price * np.concatenate(costs).mean()
        for factor, of_column in zip(self.factors, costs, strict=True):
            codes[:, factor.order] = _round(rows[:, factor.order], factor.upper, bits, price / of_column, largest)
        return codes


def _round(
    rows: np.ndarray,
    upper: np.ndarray,
    bits: Callable[[np.ndarray], np.ndarray],
    prices: np.ndarray,
    largest: int | None,
) -> np.ndarray:
    """Integers (R, K) for `rows` (R, K), in the order of `upper` (K, K); prices (K,) in squared steps."""
    size = rows.shape[1]
    rest, codes = rows.astype(np.float64), np.empty(rows.shape, np.int64)
    for start in range(0, size, BLOCK):
        end = min(size, start + BLOCK)
        errors = np.empty((len(rest), end - start))
        for j in range(start, end):
            column = rest[:, j]
            nearest = np.rint(column) if largest is None else np.rint(column).clip(-largest, largest)
            code = toward_zero(column, nearest.astype(np.int64), bits, prices[j])
            error = (column - code) / upper[j, j]
            rest[:, j + 1 : end] -= np.outer(error, upper[j, j + 1 : end])
            codes[:, j], errors[:, j - start] = code, error
        rest[:, end:] -= errors @ upper[start:end, end:]
    return codes


def toward_zero(
    scaled: np.ndarray, codes: np.ndarray, bits: Callable[[np.ndarray], np.ndarray], price: float
) -> np.ndarray:
    """`codes`, or the next toward zero where its fewer bits pay for its squared error (rate-distortion optimised
    quantization, Sullivan & Wiegand 1998)."""
    lower = codes - np.sign(codes)
    gain = (scaled - lower) ** 2 - (scaled - codes) ** 2 + price * (bits(lower) - bits(codes))
    return np.where((gain < 0) & (abs(scaled - lower) < 1), lower, codes)


def make_feedback(moments: list[tuple[np.ndarray, torch.Tensor]], transposed: bool = False) -> Feedback:
    """Of the second moments of a layer's patches, of which the upper triangles are read: pairs (columns (K,), moment
    (K, K)), one for each set of columns that no patch sees together with the others.

    Raises ValueError where they are not finite.
    """
    mean = float(torch.cat([moment.diagonal() for _, moment in moments]).double().mean())
    damping = DAMPING * (mean or 1.0)
    factors, left = [], []
    for columns, moment in moments:
        order, upper = _factorize(moment, damping)
        factors.append(Factor(columns[order], upper.astype(np.float32)))
        left.append(1 / upper.diagonal() ** 2)
    return Feedback(factors, transposed, float(np.concatenate(left).mean() / (mean + damping)))


def _factorize(moment: torch.Tensor, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """The order of columns, the largest first, and the upper Cholesky factor (float64) of the inverse in that order.

    It is the inverse of the factor of the reversed matrix, reversed, so the matrix itself need not be inverted.
    """
    matrix = moment.detach().cpu().numpy()
    order = np.argsort(-matrix.diagonal(), kind="stable")
    matrix = (np.triu(matrix) + np.triu(matrix, 1).T)[np.ix_(order[::-1], order[::-1])].astype(np.float64)
    matrix[np.diag_indices(len(matrix))] += damping
    lower, failed = lapack.dpotrf(matrix.T, lower=1, overwrite_a=1)  # in place: LAPACK wants columns first
    if failed or not np.isfinite(lower.diagonal()).all():
        raise ValueError("the second moments of a layer's inputs are not finite")
    inverse, _ = lapack.dtrtri(lower, lower=1, overwrite_c=1)
    return order, inverse[::-1, ::-1]


def measure_feedback(network: nn.Module, loss: SampleLoss, samples: tuple[torch.Tensor, ...]) -> dict[str, Feedback]:
    """{weight: Feedback} of the linear layers and the plain convolutions of `network` that the loss calls.

    Each patch counts by the squared gradient of the sample's loss at the output that it makes, so that places and
    samples that do not matter do not decide. Every process measures all: a sum of other parts would round otherwise.
    """
    layers = {name: module for name, module in network.named_modules() if _has_patches(module)}
    moments: dict[str, list[tuple[np.ndarray, torch.Tensor]]] = {}

    def visit(name: str, layer: nn.Module, x: torch.Tensor, g: torch.Tensor, calls_left: int) -> None:
        weights = _places_last(layer, g).float().square().sum(1).sqrt()  # (N, L)
        for i, (columns, places, patches) in enumerate(patches_of(layer, x)):
            if len(moments.setdefault(name, [])) == i:
                moments[name].append((columns, x.new_zeros(len(columns), len(columns), dtype=torch.float32)))
            rows = patches.transpose(1, 2).flatten(0, 1) * weights[:, places].reshape(-1, 1)  # (N L, K)
            _add_products(moments[name][i][1], rows.float())

    for start in tqdm(range(0, len(samples[0]), CHUNK), desc="moments", unit="batch"):
        visit_layers(network, layers, loss, tuple(s[start : start + CHUNK] for s in samples), visit)
    feedback = {}
    for name in tqdm(list(moments), desc="factors", unit="layer"):  # each moment goes as its factor comes
        feedback[f"{name}.weight"] = make_feedback(moments.pop(name), isinstance(layers[name], nn.ConvTranspose2d))
    return feedback


def _add_products(moment: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds the inner products of the columns of `rows` (M, K) to the upper triangle, at least, of `moment` (K, K)."""
    if moment.device.type == "cpu" and len(rows):  # half the work of a product, and torch has none for it
        blas.ssyrk(1.0, rows.contiguous().numpy().T, beta=1.0, c=moment.numpy().T, lower=1, overwrite_c=1)
    else:
        moment.addmm_(rows.T, rows)


def _has_patches(layer: nn.Module) -> bool:
    """Whether `patches_of` knows the layer."""
    if isinstance(layer, nn.ConvTranspose2d) and (layer.dilation != (1, 1) or layer.output_padding != (0, 0)):
        return False
    return isinstance(layer, nn.Linear) or (is_plain_convolution(layer) and layer.groups == 1)


def patches_of(layer: nn.Module, x: torch.Tensor) -> Iterator[tuple[np.ndarray, torch.Tensor | slice, torch.Tensor]]:
    """Columns (K,) of `Feedback.rows`, some of the layer's outputs (L,) and the patch of the input that makes each of
    these, (N, K, L). The columns of a patch are in no other, and what is left out is zero.

    A transposed convolution of stride s has s^2 such sets for its kernel's entries: an output sees each s-th of them.
    """
    if not isinstance(layer, nn.ConvTranspose2d):
        linear = isinstance(layer, nn.Linear)
        settings = () if linear else (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        patches = _places_last(layer, x) if linear else F.unfold(x, *settings)
        yield np.arange(patches.shape[1]), slice(None), patches
        return
    n, channels, height, width = x.shape
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    above, before = rows - 1 - layer.padding[0], columns - 1 - layer.padding[1]
    spread = x.new_zeros(n, channels, down * (height - 1) + 1, right * (width - 1) + 1)
    spread[:, :, ::down, ::right] = x
    spread = F.pad(spread, (before, before, above, above))
    entries = np.arange(channels * rows * columns).reshape(channels, rows, columns)
    outputs = torch.arange((spread.shape[2] - rows + 1) * (spread.shape[3] - columns + 1), device=x.device)
    outputs = outputs.view(spread.shape[2] - rows + 1, -1)
    for i in range(min(down, rows)):
        for j in range(min(right, columns)):
            top, left = (above - i) % down, (before - j) % right
            seen, made = entries[:, i::down, j::right], outputs[top::down, left::right]
            if not made.numel():
                yield seen.ravel(), made.flatten(), x.new_zeros(n, seen.size, 0)
                continue
            part = spread[:, :, top + i :: down, left + j :: right]
            part = part[:, :, : made.shape[0] + seen.shape[1] - 1, : made.shape[1] + seen.shape[2] - 1]
            yield seen.ravel(), made.flatten(), F.unfold(part, seen.shape[1:])


def _places_last(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N, C, L)"""
    return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2) if isinstance(layer, nn.Linear) else x.flatten(2)
