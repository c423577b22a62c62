"""Rounding layer after layer, each so that its output is the exact one although its inputs no longer are.

A layer of weight W has exact inputs X and others, X', once the layers before it are rounded. What is rounded is the V
for which V X' is nearest to W X: so each layer makes good what those before it did, as far as its own inputs tell
("asymmetric calibration", Li et al. 2025, "GPTAQ: Efficient finetuning-free quantization for asymmetric calibration",
ICML, arXiv 2504.02692). What is left of the mean goes into the layer's bias (Nagel et al. 2019, "Data-free quantization
through weight equalization and bias correction").
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from common.choose.patches import has_patches, windows_of
from common.choose.rounding import Rounding, choose_codes, decoded, store
from common.formats.entropy import LARGEST_CODE
from common.formats.row_steps import Step, stored_steps

DAMPING = 0.1  # of the mean second moment of inputs, added to each: V stays near W where few inputs speak for another
PLACES = 64  # of each image and layer: outputs whose inputs are looked at
CHUNK = 64  # images


@torch.inference_mode()
def exact_inputs(network: nn.Module, samples: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """{layer: input of its first call} of the layers that can have feedback."""
    layers = {name: layer for name, layer in network.named_modules() if has_patches(layer)}
    inputs: dict[str, torch.Tensor] = {}
    with _before_calls(layers, lambda name, x: inputs.setdefault(name, x)):
        network(*samples)
    return inputs


def encode_in_turn(
    network: nn.Module,
    samples: tuple[torch.Tensor, ...],
    exact: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    steps: dict[str, Step],
    rounding: Rounding,
) -> dict[str, torch.Tensor]:
    """What a file stores of `weights`, the parameters of `network`, rounded to multiples of `steps`: the layers that
    have feedback one after the other, as the network calls them on `samples`. exact: its `exact_inputs` on these.
    Raises ValueError as `choose_codes`."""
    steps = {name: stored_steps(steps[name]) for name in weights}
    rounded = copy.deepcopy(network)
    layers = {name: rounded.get_submodule(name) for name in exact if f"{name}.weight" in rounding.feedback}
    in_turn = {f"{name}.weight" for name in layers}
    state, codes = rounded.state_dict(), {}

    def settle(more: dict[str, np.ndarray]) -> None:
        """From here on the network has what these codes stand for."""
        codes.update(more)
        for name, of in more.items():
            state[name].copy_(torch.from_numpy(decoded(of, steps[name], rounding.axis(name, of.shape))))

    def visit(name: str, x: torch.Tensor) -> None:
        weight, bias = f"{name}.weight", f"{name}.bias"
        if weight in codes:  # an earlier call has settled it
            return
        feedback, seen = rounding.feedback[weight], _look(layers[name], exact[name], x)
        rows = feedback.rows(weights[weight].double().cpu()).numpy()
        target = feedback.weight(_compensated(rows, seen), weights[weight].shape)
        largest = LARGEST_CODE * np.asarray(steps[weight], np.float64)
        target = torch.from_numpy(np.clip(target, -largest, largest))
        settle(choose_codes({weight: target}, {weight: steps[weight]}, rounding))
        if bias in weights:
            now = feedback.rows(state[weight].double().cpu()).numpy()
            found = (weights[bias].double().cpu().numpy() + _mean_lack(rows, now, seen)) / steps[bias]
            if abs(found).max() <= LARGEST_CODE:  # beyond it, steps are those of a bias that is not there: it stays so
                settle({bias: np.rint(found).astype(np.int64)})

    settle(choose_codes({n: w for n, w in weights.items() if n not in in_turn}, steps, rounding))
    with torch.inference_mode(), _before_calls(layers, visit):
        rounded(*samples)
    return store({name: codes[name] for name in weights}, steps, rounding)


@contextmanager
def _before_calls(layers: dict[str, nn.Module], visit: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
    """visit(name, input) before each call of one of the layers, inside."""

    def hook(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        visit(name, inputs[0])

    hooks = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for of_layer in hooks:
            of_layer.remove()


@dataclass
class _Inputs:
    """Of the `columns` (K,) that outputs see together, sums over `count` outputs: of products of the inputs that there
    are (K, K), and of the exact ones less these with these; and of each input, (K,)."""

    columns: np.ndarray
    found: torch.Tensor
    lacking: torch.Tensor
    exact_sum: torch.Tensor
    found_sum: torch.Tensor
    count: int = 0


def _look(layer: nn.Module, exact: torch.Tensor, found: torch.Tensor) -> list[_Inputs]:
    """What the layer's exact inputs (N, ...) and those that there are say of each other, at some of its outputs."""
    seen: list[_Inputs] = []
    generator = torch.Generator().manual_seed(0)
    chosen: list[torch.Tensor] = []  # (2, P): places of outputs, down and right
    for of_exact, of_found in zip(exact.split(CHUNK), found.split(CHUNK), strict=True):
        pairs = zip(windows_of(layer, of_exact), windows_of(layer, of_found), strict=True)
        for i, ((columns, _, wanted), (_, _, there)) in enumerate(pairs):
            if len(seen) == i:
                size = len(columns)
                zeros = (
                    wanted.new_zeros(shape, dtype=torch.float64) for shape in ((size, size), (size, size), size, size)
                )
                seen.append(_Inputs(columns, *zeros))
                outputs = torch.cartesian_prod(*map(torch.arange, wanted.shape[2:4]))
                chosen.append(outputs[torch.randperm(len(outputs), generator=generator)[:PLACES]].T.to(wanted.device))
            a, b = (_patches_at(of, chosen[i]) for of in (wanted, there))
            inputs = seen[i]
            inputs.found += b.T @ b
            inputs.lacking += (a - b).T @ b
            inputs.exact_sum += a.sum(0)
            inputs.found_sum += b.sum(0)
            inputs.count += len(a)
    return seen


def _patches_at(windows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(N P, K): the patches at outputs `places` (2, P) among `windows` (N, C, H, W, h, w), K = C h w."""
    return windows.permute(0, 2, 3, 1, 4, 5)[:, *places].float().flatten(2).flatten(0, 1)


def _compensated(rows: np.ndarray, seen: list[_Inputs]) -> np.ndarray:
    """V for the weight W = rows (R, K): W + W L (M + d I)^-1, with M and L the second moments of what inputs there are,
    and of what they lack with these."""
    result = rows.copy()
    for inputs in seen:
        damping = DAMPING * float(inputs.found.diagonal().mean())
        if damping > 0:
            moment = inputs.found + damping * torch.eye(len(inputs.found)).to(inputs.found)
            change = torch.linalg.solve(moment, inputs.lacking.T).T.cpu().numpy()
            result[:, inputs.columns] += rows[:, inputs.columns] @ change
    return result


def _mean_lack(rows: np.ndarray, rounded: np.ndarray, seen: list[_Inputs]) -> np.ndarray:
    """(R,): what the outputs of `rounded` lack on average."""
    total = np.zeros(len(rows))
    for inputs in seen:
        exact, found = inputs.exact_sum.cpu().numpy(), inputs.found_sum.cpu().numpy()
        total += rows[:, inputs.columns] @ exact - rounded[:, inputs.columns] @ found
    return total / max(1, sum(inputs.count for inputs in seen))
