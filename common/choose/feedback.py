"""Rounding that looks at its neighbours: the error of each weight is made good by those still to be rounded.

A layer's output is its weight, a matrix of rows (output channels), times the patches of its input. Where patches are
alike, the error of one column can be undone by others, and where the loss feels outputs alike, that of one row by
others. Two second moments of the weight's gradients say how, one for columns and one for rows: the curvature of the
loss is taken for their Kronecker product (Tseng et al. 2025, "Model-Preserving Adaptive Rounding", arXiv 2505.22988,
sketch B). Successive rounding takes the Cholesky factor of the inverse of each (Frantar et al. 2023, "GPTQ", algorithm
1): from column to column, and within a column from row to row.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import linalg
from scipy.linalg import blas, lapack
from torch import nn
from tqdm import tqdm

from common.choose.patches import has_patches, patches_of, places_last
from common.choose.trellis_search import search_block
from common.fisher.gradients import SampleLoss, visit_layers
from common.formats.trellis import NO_TRELLIS

DAMPING = 0.01  # of the mean second moment, added to each: directions that no sample showed cost something too
ROW_DAMPING = 0.3  # that of rows, which are fewer samples of a rougher approximation; with 0.01 feedback by rows harms
BLOCK = 64  # columns whose errors are handed on together
CHUNK = 16  # samples
ANY = 2**31 - 1  # a largest code that bounds nothing


@dataclass(frozen=True)
class Factor:
    """For columns that are rounded one after the other: their order (K,), indices of columns, and the upper Cholesky
    factor (K, K), float32, of the inverse of their damped second moment in that order."""

    order: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class RowFactor:
    """For the rows of a column, which are rounded in their order: weights (R,) of what is left of squared errors, and
    spread (R, R), how much of a row's error is added to the targets of later rows; float64. No `spread`: (0, 0)."""

    weights: np.ndarray
    spread: np.ndarray

    def second_moments(self) -> np.ndarray:
        """(R,): of the gradients of each row, damped, whose mean is 1: what its squared errors weigh where no other row
        makes them good."""
        own = self.weights**-0.5
        root = linalg.solve_triangular(-self.spread * own[:, None], np.eye(len(own)))
        return np.square(root).sum(1)


@dataclass(frozen=True)
class Feedback:
    """For one weight: the factors of its columns; `transposed`: of a transposed convolution; column_gain: the squared
    error of the output, as a share of what it is where each entry is rounded by itself with the same step; by_rows:
    None where rows do not mend each other's errors."""

    factors: list[Factor]
    transposed: bool
    column_gain: float
    by_rows: RowFactor | None = None

    @property
    def gain(self) -> float:
        """`column_gain`, and the same of rows."""
        return self.column_gain * (1.0 if self.by_rows is None else float(self.by_rows.weights.mean()))

    def even_scales(self, rows: int) -> np.ndarray:
        """(rows,): units of rows, of geometric mean 1, in which errors of all weigh alike if none mends another's."""
        if self.by_rows is None:
            return np.ones(rows)
        scales = self.by_rows.second_moments() ** -0.5
        return scales / np.exp(np.log(scales).mean())

    def with_scales(self, scales: np.ndarray) -> "Feedback":
        """The same for rows that are in units of their own `scales` (R,)."""
        if self.by_rows is None:
            return self
        weights, spread = self.by_rows.weights * scales**2, self.by_rows.spread * (scales[:, None] / scales)
        return replace(self, by_rows=RowFactor(weights, spread))

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
        self,
        rows: np.ndarray,
        bits: np.ndarray | None = None,
        price: float = 0.0,
        largest: int = ANY,
        next_state: np.ndarray = NO_TRELLIS,
    ) -> np.ndarray:
        """Integers (R, K) for `rows` (R, K), which are in units of the step.

        bits (quantizers, 2 n + 1): the length of each code from -n to n, those at the ends for all beyond; price: of a
        bit, in units of a mean entry's squared error; largest: magnitude of a code, where codes have an end, and what
        is cut off there is an error like any other; next_state: the trellis, which runs down each column.
        """
        by_rows = self.by_rows or RowFactor(np.ones(len(rows)), np.empty((0, 0)))
        bits = np.zeros((2, 1)) if bits is None else bits
        bits = bits if len(bits) == 2 else np.repeat(bits, 2, axis=0)
        left = [1 / np.square(factor.upper.diagonal().astype(np.float64)) for factor in self.factors]
        price = float(price * np.concatenate(left).mean() * by_rows.weights.mean())
        codes = np.empty(rows.shape, np.int64)
        for factor in self.factors:
            columns = np.ascontiguousarray(rows[:, factor.order].T, dtype=np.float64)
            found = _round(columns, factor.upper, by_rows, bits, price, largest, next_state)
            codes[:, factor.order] = found.T
        return codes


def _round(
    rest: np.ndarray,
    upper: np.ndarray,
    by_rows: RowFactor,
    bits: np.ndarray,
    price: float,
    largest: int,
    next_state: np.ndarray,
) -> np.ndarray:
    """Integers (K, R) for columns `rest` (K, R) in the order of `upper` (K, K); writes over `rest`."""
    size, upper, spread = len(rest), upper.astype(np.float64), by_rows.spread.astype(np.float32)
    codes, values = np.empty(rest.shape, np.int64), np.empty(rest.shape, np.int64)
    for start in range(0, size, BLOCK):
        end = min(size, start + BLOCK)
        errors = np.empty((end - start, rest.shape[1]))
        search_block(
            rest, upper, start, end, by_rows.weights, spread, next_state, bits, price, largest, codes, values,
            errors,
        )  # fmt: skip
        rest[end:] -= upper[start:end, end:].T @ errors
    return codes


def no_feedback(weight_shape: torch.Size, transposed: bool = False) -> Feedback:
    """Columns and rows that know nothing of each other."""
    rows = weight_shape[1] if transposed else weight_shape[0]
    size = weight_shape.numel() // rows
    blocks = [np.arange(start, min(size, start + BLOCK)) for start in range(0, size, BLOCK)]
    return Feedback([Factor(block, np.eye(len(block), dtype=np.float32)) for block in blocks], transposed, 1.0)


def make_feedback(
    moments: list[tuple[np.ndarray, torch.Tensor]], transposed: bool = False, of_rows: torch.Tensor | None = None
) -> Feedback:
    """Of the second moments of a weight's gradients by column, of which the upper triangles are read: pairs (columns
    (K,), moment (K, K)), one for each set of columns that no patch sees together with the others; and by row, (R, R).

    Raises ValueError where they are not finite.
    """
    mean = float(torch.cat([moment.diagonal() for _, moment in moments]).double().mean())
    damping = DAMPING * (mean or 1.0)
    factors, left = [], []
    for columns, moment in moments:
        order, upper = _factorize(moment, damping)
        factors.append(Factor(columns[order], upper.astype(np.float32)))
        left.append(1 / upper.diagonal() ** 2)
    gain = float(np.concatenate(left).mean() / (mean + damping))
    by_rows = None if of_rows is None or len(of_rows) < 2 else factorize_rows(of_rows)
    return Feedback(factors, transposed, gain, by_rows)


def factorize_rows(moment: torch.Tensor) -> RowFactor:
    """The factor of a second moment (R, R) of rows, damped, whose mean diagonal entry becomes 1. Raises ValueError
    where it is not finite."""
    mean = float(moment.diagonal().double().mean()) or 1.0
    matrix = (moment.detach().cpu().double().numpy() / mean + ROW_DAMPING * np.eye(len(moment))) / (1 + ROW_DAMPING)
    lower, failed = lapack.dpotrf(matrix[::-1, ::-1], lower=1)
    if failed or not np.isfinite(lower.diagonal()).all():
        raise ValueError("the second moments of a layer's gradients are not finite")
    inverse, _ = lapack.dtrtri(lower, lower=1)
    upper = np.triu(inverse[::-1, ::-1])
    own = upper.diagonal()
    return RowFactor(1 / own**2, np.ascontiguousarray(-upper / own[:, None]))


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

    The moments are those of the samples' gradients G (R, K) by each weight: the sums of G'G by columns and of GG' by
    rows, call by call where a layer is called more than once. With a loss that is `gauss_newton.signed_sum` they are
    sums of blocks of the Gauss-Newton matrix. Every process measures all: a sum of other parts would round otherwise.
    """
    layers = {name: module for name, module in network.named_modules() if has_patches(module)}
    moments: dict[str, list[tuple[np.ndarray, torch.Tensor]]] = {}
    of_rows: dict[str, torch.Tensor] = {}

    def visit(name: str, layer: nn.Module, x: torch.Tensor, g: torch.Tensor, calls_left: int) -> None:
        g = places_last(layer, g).float()  # (N, R, L)
        if name not in of_rows:
            of_rows[name] = g.new_zeros(g.shape[1], g.shape[1])
        for i, (columns, places, patches) in enumerate(patches_of(layer, x)):
            if len(moments.setdefault(name, [])) == i:
                moments[name].append((columns, g.new_zeros(len(columns), len(columns))))
            factors = _gradient_factors(g[:, :, places], patches.float(), of_rows[name])
            _add_products(moments[name][i][1], factors)

    for start in tqdm(range(0, len(samples[0]), CHUNK), desc="moments", unit="batch"):
        visit_layers(network, layers, loss, tuple(s[start : start + CHUNK] for s in samples), visit)
    feedback = {}
    for name in tqdm(list(moments), desc="factors", unit="layer"):  # each moment goes as its factor comes
        transposed = isinstance(layers[name], nn.ConvTranspose2d)
        feedback[f"{name}.weight"] = make_feedback(moments.pop(name), transposed, of_rows.pop(name))
    return feedback


def _gradient_factors(g: torch.Tensor, patches: torch.Tensor, of_rows: torch.Tensor) -> torch.Tensor:
    """Rows (M, K) whose inner products of columns are the sum of G'G, for gradients G = g patches' of each sample; g
    (N, R, L), patches (N, K, L). Adds the sum of GG' to `of_rows`."""
    if g.shape[1] <= g.shape[2]:
        gradients = g @ patches.transpose(1, 2)  # (N, R, K)
        by_row = gradients.transpose(0, 1).flatten(1)
        of_rows.addmm_(by_row, by_row.T)
        return gradients.flatten(0, 1)
    of_rows += (g @ (patches.transpose(1, 2) @ patches) @ g.transpose(1, 2)).sum(0)
    g = g.double()  # FP32 sums of dependent columns are not positive definite, by more than `tiny`
    inner = g.transpose(1, 2) @ g  # fewer places than rows: the roots of (N, L, L) do
    tiny = 1e-9 * inner.diagonal(dim1=1, dim2=2).mean(1) + 1e-300
    roots = torch.linalg.cholesky(inner + tiny[:, None, None] * torch.eye(len(inner[0])).to(inner)).float()
    return (patches @ roots).transpose(1, 2).flatten(0, 1)


def _add_products(moment: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds the inner products of the columns of `rows` (M, K) to the upper triangle, at least, of `moment` (K, K)."""
    if moment.device.type == "cpu" and len(rows):  # half the work of a product, and torch has none for it
        blas.ssyrk(1.0, rows.contiguous().numpy().T, beta=1.0, c=moment.numpy().T, lower=1, overwrite_c=1)
    else:
        moment.addmm_(rows.T, rows)
