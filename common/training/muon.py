"""The Muon optimizer (Jordan et al. 2024), for the weights that are matrices."""

from itertools import groupby

import torch

# Coefficients of the quintic of Jordan et al. 2024: singular values of 1e-3 and more end in about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix to the momentum, so that every direction of a weight moves alike.

    torch.optim.Muon takes 2-D weights alone and multiplies in bfloat16, which CPUs without it emulate. Here a
    convolution is the matrix of its first axis by the rest, and the products are in `dtype`. On CUDA weights of one
    shape are multiplied together. lr: a number, or a tensor () on the weights' device.
    """

    def __init__(
        self, parameters, lr: float | torch.Tensor, momentum: float = 0.95, dtype: torch.dtype = torch.float32
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weights in _alike(group["params"]):
                nesterov = []
                for weight in weights:
                    state = self.state[weight]
                    if not state:
                        state["momentum"] = torch.zeros_like(weight)
                    state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                    nesterov.append(weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1))
                together = nesterov[0] if len(nesterov) == 1 else torch.stack(nesterov)
                updates = orthogonalize(together, self.dtype).view(len(weights), *weights[0].shape)
                rate = group["lr"] * max(1, updates.shape[1] / weights[0][0].numel()) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.sub_(update.to(weight.dtype) * rate)


def _alike(weights: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The weights, those of one shape together on CUDA, where a product of many is faster."""
    if weights[0].device.type != "cuda":
        return [[weight] for weight in weights]
    in_order = sorted(weights, key=lambda weight: weight.shape)
    return [list(group) for _, group in groupby(in_order, key=lambda weight: weight.shape)]


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> torch.Tensor:
    """About U V' of the singular value decomposition U S V' of each matrix (..., rows, columns), by Newton-Schulz
    steps.

    The steps are in `dtype`; so is the result.
    """
    a, b, c = QUINTIC
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
