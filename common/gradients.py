"""Squared gradients of single samples, for any module.

Where every parameter sits in a layer of a known kind, a sample's gradient follows from the layer's input and the
gradient of its output (Rochette et al. 2019, "Efficient per-example gradient computations"), so one backward pass over
the batch does, and one over a single sample to check it. Any other network takes torch.func's vectorised gradients:
the same values, more slowly.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.grad import conv2d_weight

# loss(network, *batch) returns one value per sample, (N,); `network` is called like the module itself.
SampleLoss = Callable[..., torch.Tensor]


def squared_gradients(
    network: nn.Module, loss: SampleLoss, samples: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """For each parameter: the mean over its entries of (d loss_n / d w)^2, per sample n; (N,).

    Each tensor of `samples` has N as its first dimension. Samples must not meet inside the network (no batch
    normalisation in training mode). Batch-averaged gradients are never squared.
    """
    layers = {name: module for name, module in network.named_modules() if [*module.parameters(recurse=False)]}
    if all(_is_known(layer) for layer in layers.values()):
        values = _from_activations(network, layers, loss, samples)
        if _fits_first_sample(values, network, loss, samples):
            return values
    return _vectorised(network, loss, samples)


def _fits_first_sample(values, network, loss, samples) -> bool:
    """Whether the first sample's values are those of its own backward pass.

    They are not where a network does what its layers cannot show: it shares a weight, uses one without calling its
    layer, or moves samples out of the first dimension.
    """
    parameters = dict(network.named_parameters())
    frozen = [p for p in parameters.values() if not p.requires_grad]
    network.requires_grad_(True)
    with torch.enable_grad():
        first = loss(network, *(s[:1] for s in samples)).sum()
    gradients = torch.autograd.grad(first, list(parameters.values()), allow_unused=True)
    for parameter in frozen:
        parameter.requires_grad_(False)
    expected = torch.stack([first.detach() * 0 if g is None else g.square().mean() for g in gradients])
    if any(values[name].shape != (len(samples[0]),) for name in parameters):
        return False
    measured = torch.stack([values[name][0] for name in parameters])
    # Gradients that cancel but for rounding differ between any two ways; they are nothing beside the largest.
    return torch.allclose(measured, expected, rtol=1e-2, atol=1e-12 * float(expected.max()))


def _vectorised(network, loss, samples) -> dict[str, torch.Tensor]:
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def sample_loss(parameters, *sample):
        def call(*inputs):
            return functional_call(network, (parameters, buffers), inputs)

        return loss(call, *(s.unsqueeze(0) for s in sample)).squeeze(0)

    per_sample = vmap(grad(sample_loss), in_dims=(None, *[0] * len(samples)))
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the fused kernels cannot be vectorised
        warnings.filterwarnings("ignore", message="There is a performance drop")
        gradients = per_sample(parameters, *samples)
    return {name: g.flatten(1).square().mean(1) for name, g in gradients.items()}


def _is_known(layer: nn.Module) -> bool:
    if type(layer) in (nn.Conv2d, nn.ConvTranspose2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in (nn.Linear, nn.GroupNorm)


def _from_activations(network, layers: dict[str, nn.Module], loss, samples) -> dict[str, torch.Tensor]:
    calls: Counter[str] = Counter()
    gradients: dict[str, torch.Tensor] = {}  # of layers that are called more than once, until the last call is in
    squares: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def forward_hook(layer, inputs, output):
            calls[name] += 1
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()  # a clone, since what follows may work in place
            output.register_hook(lambda g: backward(name, layer, inputs[0].detach(), g))
            return output

        return forward_hook

    def backward(name: str, layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> None:
        calls[name] -= 1
        for parameter, gradient in _sample_gradients(layer, x, g):
            key = f"{name}.{parameter}".lstrip(".")
            if key in gradients:
                gradient = gradients.pop(key) + gradient
            if calls[name]:
                gradients[key] = gradient
            else:
                squares[key] = gradient.flatten(1).square().mean(1)

    trainable = [p for p in network.parameters() if p.requires_grad]
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        network.requires_grad_(False)  # spares the gradient of the batch, which nobody needs
        with torch.enable_grad():
            loss(network, *samples).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.requires_grad_()
    zeros = samples[0].new_zeros(len(samples[0]), dtype=torch.float32)  # a layer that the loss does not reach
    return {name: squares.get(name, zeros) for name, _ in network.named_parameters()}


@torch.no_grad()
def _sample_gradients(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter, gradient of each sample (N, entries)) of a layer with input `x` and output gradient `g`."""
    n = len(x)
    if isinstance(layer, nn.Linear):
        x, g = x.reshape(n, -1, x.shape[-1]), g.reshape(n, -1, g.shape[-1])  # (N, L, C)
        yield "weight", torch.bmm(g.transpose(1, 2), x)
        bias = g.sum(1)
    elif isinstance(layer, nn.GroupNorm):
        normalised = F.group_norm(x, layer.num_groups, eps=layer.eps)
        yield "weight", (normalised * g).flatten(2).sum(2)
        bias = g.flatten(2).sum(2)
    else:
        narrow, wide = (x, g) if isinstance(layer, nn.ConvTranspose2d) else (g, x)
        shape, settings = layer.weight.shape, (layer.stride, layer.padding, layer.dilation, layer.groups)
        # One sample at a time: the libraries' own kernel is faster than any vectorised form of it.
        gradients = [conv2d_weight(wide[i : i + 1], shape, narrow[i : i + 1], *settings) for i in range(n)]
        yield "weight", torch.stack(gradients).flatten(1)
        bias = g.flatten(2).sum(2)
    if layer.bias is not None:
        yield "bias", bias
