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

from common.choose.feedback import Feedback
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


def round_in_turn(
    rounded: nn.Module,
    samples: tuple[torch.Tensor, ...],
    exact: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    feedback: dict[str, Feedback],
    settle: Callable[[str, torch.Tensor], torch.Tensor],
) -> None:
    """The layers that have feedback one after the other, as the network calls them on `samples`: each one's weight, and
    then its bias, becomes what `settle` makes of the best one for the inputs that there are, float64.

    rounded: the rounded network, which is changed in place; exact: `exact_inputs` of the exact one, whose parameters
    are `weights`.
    """
    layers = {name: rounded.get_submodule(name) for name in exact if f"{name}.weight" in feedback}
    state, settled = rounded.state_dict(), set()

    def visit(name: str, x: torch.Tensor) -> None:
        if name in settled:  # by an earlier call
            return
        settled.add(name)
        weight, bias, of_layer = f"{name}.weight", f"{name}.bias", feedback[f"{name}.weight"]
        seen = _look(layers[name], exact[name], x)
        rows = of_layer.rows(weights[weight].double().cpu()).numpy()
        best = of_layer.weight(_compensated(rows, seen), weights[weight].shape)
        state[weight].copy_(settle(weight, torch.from_numpy(np.ascontiguousarray(best))))
        if bias in weights:
            now = of_layer.rows(state[weight].double().cpu()).numpy()
            best = weights[bias].double().cpu() + torch.from_numpy(_mean_lack(rows, now, seen))
            state[bias].copy_(settle(bias, best))

    with torch.inference_mode(), _before_calls(layers, visit):
        rounded(*samples)


def encode_in_turn(
    network: nn.Module,
    samples: tuple[torch.Tensor, ...],
    exact: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    steps: dict[str, Step],
    rounding: Rounding,
) -> dict[str, torch.Tensor]:
    """What a file stores of `weights`, the parameters of `network`, rounded in turn to multiples of `steps`. exact: its
    `exact_inputs` on the `samples`. Raises ValueError as `choose_codes`."""
    steps = {name: stored_steps(steps[name]) for name in weights}
    in_turn = {f"{name}.weight" for name in exact} & rounding.feedback.keys()
    codes = choose_codes({n: w for n, w in weights.items() if n not in in_turn}, steps, rounding)

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(decoded(codes[name], steps[name], rounding.axis(name, weights[name].shape)))

    def settle(name: str, best: torch.Tensor) -> torch.Tensor:
        largest = LARGEST_CODE * torch.as_tensor(np.asarray(steps[name], np.float64))
        if name in in_turn:
            codes.update(choose_codes({name: best.clamp(-largest, largest)}, {name: steps[name]}, rounding))
        elif (best.abs() <= largest).all():  # beyond it, steps are those of a bias that is not there: it stays so
            codes[name] = np.rint(best.numpy() / steps[name]).astype(np.int64)
        return read(name)

    rounded = copy.deepcopy(network)
    state = rounded.state_dict()
    for name in codes:
        state[name].copy_(read(name))
    round_in_turn(rounded, samples, exact, weights, rounding.feedback, settle)
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
