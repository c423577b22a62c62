"""The patches of a layer's input, each of which makes one output: a layer is a matrix times these."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.fisher.gradients import is_plain_convolution


def has_patches(layer: nn.Module) -> bool:
    """Whether `patches_of` knows the layer."""
    if isinstance(layer, nn.ConvTranspose2d) and (layer.dilation != (1, 1) or layer.output_padding != (0, 0)):
        return False
    return isinstance(layer, nn.Linear) or (is_plain_convolution(layer) and layer.groups == 1)


def patches_of(layer: nn.Module, x: torch.Tensor) -> Iterator[tuple[np.ndarray, torch.Tensor | slice, torch.Tensor]]:
    """Columns (K,) of `Feedback.rows`, some of the layer's outputs (L,) and the patch of the input that makes each of
    these, (N, K, L). The columns of a patch are in no other, and what is left out is zero.

    A transposed convolution of stride s has s^2 such sets for its kernel's entries: an output sees each s-th of them.
    """
    for columns, outputs, windows in windows_of(layer, x):
        yield columns, outputs, windows.permute(0, 1, 4, 5, 2, 3).reshape(len(x), len(columns), -1)


def windows_of(layer: nn.Module, x: torch.Tensor) -> Iterator[tuple[np.ndarray, torch.Tensor | slice, torch.Tensor]]:
    """As `patches_of`, but patches are views of the padded input, (N, C, H, W, h, w), with H W = L and C h w = K: so
    that those of some outputs can be taken without a copy of all."""
    if isinstance(layer, nn.Linear):
        places = places_last(layer, x)
        yield np.arange(places.shape[1]), slice(None), places[:, :, :, None, None, None]
        return
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    if not isinstance(layer, nn.ConvTranspose2d):
        (above, before), (far_down, far_right) = layer.padding, layer.dilation
        padded = F.pad(x, (before, before, above, above))
        windows = padded.unfold(2, far_down * (rows - 1) + 1, down).unfold(3, far_right * (columns - 1) + 1, right)
        yield np.arange(x.shape[1] * rows * columns), slice(None), windows[..., ::far_down, ::far_right]
        return
    n, channels, height, width = x.shape
    entries = np.arange(channels * rows * columns).reshape(channels, rows, columns)
    for i in range(min(down, rows)):
        made_down, first_down, _ = _phase(i, height, rows, down, layer.padding[0])
        for j in range(min(right, columns)):
            made_right, first_right, all_right = _phase(j, width, columns, right, layer.padding[1])
            seen = entries[:, i::down, j::right]
            _, h, w = seen.shape
            outputs = torch.from_numpy(np.add.outer(made_down * all_right, made_right).ravel()).to(x.device)
            if not len(outputs):
                yield seen.ravel(), outputs, x.new_zeros(n, channels, 0, 0, h, w)
                continue
            below, behind = first_down + len(made_down) + h - 1 - height, first_right + len(made_right) + w - 1 - width
            part = F.pad(x, (-first_right, behind, -first_down, below))
            yield seen.ravel(), outputs, part.unfold(2, h, 1).unfold(3, w, 1)


def _phase(i: int, size: int, kernel: int, stride: int, padding: int) -> tuple[np.ndarray, int, int]:
    """Along one dimension of a transposed convolution: the outputs that see each stride-th entry of the flipped kernel
    from the i-th on; which of `size` inputs the first of them sees first, which may lie before these; and the number of
    all outputs."""
    before, count = kernel - 1 - padding, (size - 1) * stride - 2 * padding + kernel
    first = (before - i) % stride
    return np.arange(first, count, stride), (first + i - before) // stride, count


def places_last(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N, C, L)"""
    return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2) if isinstance(layer, nn.Linear) else x.flatten(2)
