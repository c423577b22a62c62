"""The Muon optimizer (Jordan et al. 2024), for the weights that are matrices."""

import torch

# Coefficients of the quintic of Jordan et al. 2024: singular values of 1e-3 and more end in about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix to the momentum, so that every direction of a weight moves alike.

    torch.optim.Muon takes 2-D weights alone and multiplies in bfloat16, which CPUs without it emulate. Here a
    convolution is the matrix of its first axis by the rest, and the products are in `dtype`.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.float32):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(state["momentum"], group["momentum"])
                update = orthogonalize(nesterov.flatten(1), self.dtype)
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(update.view(weight.shape), alpha=-group["lr"] * scale)


def orthogonalize(matrix: torch.Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> torch.Tensor:
    """About U V' of the singular value decomposition U S V' of a matrix (rows, columns), by Newton-Schulz steps.

    The steps are in `dtype`; so is the result.
    """
    a, b, c = QUINTIC
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
