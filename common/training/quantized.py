"""Weights that are rounded to multiples of learned steps, with the gradients of weights that are not.

Rounding is taken for the identity in the backward pass (straight-through estimator, Bengio et al. 2013); the
logarithms of steps, one for each tensor or one for each of its rows, are learned beside the weights (the step of LSQ,
Esser et al. 2020).
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from common.formats.row_steps import PARTS, Step

PART = math.log(2) / PARTS  # of an octave, in steps by rows
INSIDE = 0.45  # of a step: how far from its code a latent weight starts at most; at half a step lies the next code


@dataclass(frozen=True)
class Quantized:
    """latents {name: weight in steps}, log_steps {name: logarithm of the step, (), or of steps by rows}."""

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
        return {n: (u + (u.round() - u).detach()) * self._step(n) for n, u in self.latents.items()}

    def unrounded(self) -> dict[str, torch.Tensor]:
        """The latent weights, not in steps."""
        return {n: (u.detach() * self._step(n).detach()).cpu() for n, u in self.latents.items()}

    @contextmanager
    def steps_alone(self):
        """For an update inside: a step moves at constant weight, and not at constant weight / step.

        So its gradient says what coarser codes of the same weights cost and save. The latents, being in steps, are
        put in units of the new ones afterwards.
        """
        with torch.no_grad():
            for name, u in self.latents.items():
                self.log_steps[name].grad.sub_((u * u.grad).sum_to_size(self.log_steps[name].shape))
            before = {name: self._step(name) for name in self.log_steps}
            yield
            for name, u in self.latents.items():
                u.mul_(before[name] / self._step(name))

    def steps(self) -> dict[str, Step]:
        """What codes are multiples of."""
        steps = {name: self._step(name).detach().cpu() for name in self.log_steps}
        return {name: step.numpy() if step.dim() else float(step) for name, step in steps.items()}

    def _step(self, name: str) -> torch.Tensor:
        """Steps by rows lie on a grid of `PARTS` to the octave, as in a file."""
        log_step = self.log_steps[name]
        if not log_step.dim():
            return log_step.exp()
        rounded = (log_step / PART).round() * PART
        return (log_step + (rounded - log_step).detach()).exp()


def start_from(network: nn.Module, weights: dict[str, torch.Tensor], steps: dict[str, Step]) -> Quantized:
    """Latent weights in the cells of the codes of `weights`, on the side of the network's own: so few cross at a time,
    where from the centres those with like gradients all would at once."""
    device = next(network.parameters()).device
    quantized = Quantized({}, {})
    for name, own in network.named_parameters():
        step = torch.as_tensor(steps[name], dtype=torch.float32, device=device)
        codes = (weights[name].to(device) / step).round()
        quantized.log_steps[name] = nn.Parameter(step.log())
        latent = own.detach() / quantized._step(name).detach()
        quantized.latents[name] = nn.Parameter(latent.clamp(codes - INSIDE, codes + INSIDE))
    return quantized
