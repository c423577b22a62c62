"""Squared gradients of single samples, for any module.

Where every parameter sits in a layer of a known kind, a sample's gradient follows from the layer's input and the
gradient of its output (Rochette et al. 2019, "Efficient per-example gradient computations"), so one backward pass over
the batch does, and one over a single sample to check it. Any other network takes torch.func's vectorised gradients:
the same values, more slowly.
"""

import warnings
from collections import Counter
from collections.abc import Callable

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
    wanted = list(parameters.values())
    reached = first.requires_grad
    gradients = torch.autograd.grad(first, wanted, allow_unused=True) if reached else [None] * len(wanted)
    for parameter in frozen:
        parameter.requires_grad_(False)
    expected = torch.stack([first.detach() * 0 if g is None else g.square().mean() for g in gradients])
    if any(values[name].shape != (len(samples[0]),) for name in parameters):
        return False
    if not expected.isfinite().all():
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
    return is_plain_convolution(layer) or type(layer) in (nn.Linear, nn.GroupNorm)


def is_plain_convolution(layer: nn.Module) -> bool:
    """Whether it is one of two dimensions, padded with a number of zeros."""
    known = type(layer) in (nn.Conv2d, nn.ConvTranspose2d)
    return known and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _from_activations(network, layers: dict[str, nn.Module], loss, samples) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}  # of layers that are called more than once, until the last call is in
    squares: dict[str, torch.Tensor] = {}

    def visit(name: str, layer: nn.Module, x: torch.Tensor, g: torch.Tensor, calls_left: int) -> None:
        for parameter, gradients_of in (("weight", _weight_gradients), ("bias", _bias_gradients)):
            if getattr(layer, parameter) is None:
                continue
            key = f"{name}.{parameter}".lstrip(".")
            if parameter == "weight" and not calls_left and key not in gradients and _norms_are_cheaper(layer, x, g):
                squares[key] = _squared_norms(layer, x, g) / layer.weight.numel()
                continue
            gradient = gradients_of(layer, x, g)
            if key in gradients:
                gradient = gradients.pop(key) + gradient
            if calls_left:
                gradients[key] = gradient
            else:
                squares[key] = gradient.flatten(1).square().mean(1)

    visit_layers(network, layers, loss, samples, visit)
    zeros = samples[0].new_zeros(len(samples[0]), dtype=torch.float32)  # a layer that the loss does not reach
    return {name: squares.get(name, zeros) for name, _ in network.named_parameters()}


def visit_layers(
    network: nn.Module,
    layers: dict[str, nn.Module],
    loss: SampleLoss,
    samples: tuple[torch.Tensor, ...],
    visit: Callable[[str, nn.Module, torch.Tensor, torch.Tensor, int], None],
) -> None:
    """Calls visit(name, layer, x, g, calls_left) for each call of each of `layers`, last call first: x is its input, g
    the gradient of the summed loss by its output. Leaves no gradients behind."""
    calls: Counter[str] = Counter()

    @torch.no_grad()
    def backward(name: str, layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> None:
        calls[name] -= 1
        visit(name, layer, x, g, calls[name])

    def watch(name: str):
        def forward_hook(layer, inputs, output):
            calls[name] += 1
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()  # a clone, since what follows may work in place
            output.register_hook(lambda g: backward(name, layer, inputs[0].detach(), g))
            return output

        return forward_hook

    trainable = [p for p in network.parameters() if p.requires_grad]
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        network.requires_grad_(False)  # spares the gradient of the batch, which nobody needs
        with torch.enable_grad():
            summed = loss(network, *samples).sum()
            if summed.requires_grad:  # else it depends on none of the layers
                summed.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.requires_grad_()


def _weight_gradients(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """(N, entries): the gradient of each sample, from the layer's input `x` and the gradient `g` of its output."""
    if isinstance(layer, nn.Linear):
        x, g = x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])  # (N, L, C)
        return torch.bmm(g.transpose(1, 2), x).flatten(1)
    if isinstance(layer, nn.GroupNorm):
        return (F.group_norm(x, layer.num_groups, eps=layer.eps) * g).reshape(*g.shape[:2], -1).sum(2)
    narrow, wide = _narrow_and_wide(layer, x, g)
    shape, settings = layer.weight.shape, (layer.stride, layer.padding, layer.dilation, layer.groups)
    # One sample at a time: the libraries' own kernel is faster than any vectorised form of it.
    gradients = [conv2d_weight(wide[i : i + 1], shape, narrow[i : i + 1], *settings) for i in range(len(x))]
    return torch.stack(gradients).flatten(1)


def _bias_gradients(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """(N, C)"""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1]).sum(1)
    return g.reshape(*g.shape[:2], -1).sum(2)


def _narrow_and_wide(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sides of a convolution: at each place of the narrow one the kernel covers a patch of the wide one."""
    return (x, g) if isinstance(layer, nn.ConvTranspose2d) else (g, x)


def _norms_are_cheaper(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> bool:
    """Whether `_squared_norms` takes less arithmetic than the gradients themselves: where pixels are few."""
    if not is_plain_convolution(layer) or layer.groups > 1:
        return False
    narrow, wide = _narrow_and_wide(layer, x, g)
    places, kernel = narrow[0, 0].numel(), layer.weight[0, 0].numel()
    pixels = (wide.shape[2] + 2 * layer.padding[0]) * (wide.shape[3] + 2 * layer.padding[1])
    norms = pixels**2 * wide.shape[1] + places**2 * (narrow.shape[1] + kernel)
    return norms < places * layer.weight.numel()


def _squared_norms(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """(N,): the squared norm of each sample's gradient of a convolution's weight, without the gradient.

    It is the sum over pairs of places of (narrow . narrow') (patch . patch'), so the inner products of all pairs of
    pixels do (Goodfellow 2015, "Efficient per-example gradient computations", applied to patches).
    """
    narrow, wide = _narrow_and_wide(layer, x, g)
    vertical, horizontal = layer.padding
    wide = F.pad(wide, (horizontal, horizontal, vertical, vertical))
    (height, width), (rows, columns) = wide.shape[2:], narrow.shape[2:]
    pixels = _inner_products(wide).view(len(x), height, width, height, width)
    patches = 0
    for i in range(layer.kernel_size[0]):
        for j in range(layer.kernel_size[1]):
            down, right = i * layer.dilation[0], j * layer.dilation[1]
            vertical = slice(down, down + layer.stride[0] * (rows - 1) + 1, layer.stride[0])
            horizontal = slice(right, right + layer.stride[1] * (columns - 1) + 1, layer.stride[1])
            patches = patches + pixels[:, vertical, horizontal, vertical, horizontal]
    return (patches.flatten(1) * _inner_products(narrow).flatten(1)).sum(1).clamp(min=0)


def _inner_products(x: torch.Tensor) -> torch.Tensor:
    """(N, HW, HW): of the channels at each pair of pixels of (N, C, H, W)."""
    x = x.flatten(2)
    return torch.bmm(x.transpose(1, 2), x)
