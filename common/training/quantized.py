"""Weights that are rounded to multiples of learned steps, with the gradients of weights that are not.

The rounding is taken for the identity in the backward pass (straight-through estimator, Bengio et al. 2013); the
logarithm of each tensor's step is learned beside the weights (the step of LSQ, Esser et al. 2020).
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

INSIDE = 0.45  # of a step: how far from its code a latent weight starts at most; at half a step lies the next code


@dataclass(frozen=True)
class Quantized:
    """latents {name: weight in steps}, log_steps {name: logarithm of the step, ()}."""

    latents: dict[str, nn.Parameter]
    log_steps: dict[str, nn.Parameter]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All, by names that are unique."""
        return {
            f"{kind}/{name}": p
            for kind, of in (("latent", self.latents), ("log-step", self.log_steps))
            for name, p in of.items()
        }

    def rounded(self) -> dict[str, torch.Tensor]:
        """The weights that the network gets."""
        return {n: (u + (u.round() - u).detach()) * self.log_steps[n].exp() for n, u in self.latents.items()}

    def unrounded(self) -> dict[str, torch.Tensor]:
        """The latent weights, not in steps."""
        return {n: (u.detach() * self.log_steps[n].detach().exp()).cpu() for n, u in self.latents.items()}

    @contextmanager
    def steps_alone(self):
        """For an update inside: a step moves at constant weight, and not at constant weight / step.

        So its gradient says what coarser codes of the same weights cost and save. The latents, being in steps, are
        put in units of the new ones afterwards.
        """
        with torch.no_grad():
            for name, u in self.latents.items():
                self.log_steps[name].grad.sub_((u * u.grad).sum())
            before = {name: log_step.clone() for name, log_step in self.log_steps.items()}
            yield
            for name, u in self.latents.items():
                u.mul_((before[name] - self.log_steps[name]).exp())

    def steps(self) -> dict[str, float]:
        return {name: float(log_step.detach().exp()) for name, log_step in self.log_steps.items()}


def start_from(network: nn.Module, weights: dict[str, torch.Tensor], steps: dict[str, float]) -> Quantized:
    """Latent weights in the cells of the codes of `weights`, on the side of the network's own: so few cross at a time,
    where from the centres those with like gradients all would at once."""
    device = next(network.parameters()).device
    quantized = Quantized({}, {})
    for name, own in network.named_parameters():
        step = torch.tensor(steps[name], dtype=torch.float32, device=device)
        codes = (weights[name].to(device) / step).round()
        quantized.latents[name] = nn.Parameter((own.detach() / step).clamp(codes - INSIDE, codes + INSIDE))
        quantized.log_steps[name] = nn.Parameter(step.log())
    return quantized
