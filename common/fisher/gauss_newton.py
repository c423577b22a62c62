"""Gauss-Newton curvature of any module's squared error: by how much it grows where the weights are in error.

The loss of a sample is the mean over P outputs of (output_p - target_p)^2. Its Gauss-Newton Hessian is (2 / P) J'J,
with J_pw = d output_p / d w (Martens 2020, "New insights and perspectives on the natural gradient method", section 8).
To second order, errors dw of mean zero that are independent of each other therefore add the sum over w of G_w dw_w^2
to the loss, with G_w = (1 / P) sum_p J_pw^2. The empirical Fisher information is no such increase: its J is weighed by
residuals, summed over the outputs and divided by P, squared.

G_w is the mean over random signs s of (d / d w of sum_p s_p output_p)^2 / P (Bekas et al. 2007, "An estimator for the
diagonal of a matrix"), so one backward pass for each sample estimates it for all weights.
"""

from collections.abc import Callable

import torch
from torch import nn

from common.fisher.gradients import SampleLoss
from common.fisher.information import fisher_information

# output(network, *batch) returns what the target is compared with, (N, ...); `network` is called like the module.
Output = Callable[..., torch.Tensor]


def gauss_newton(
    network: nn.Module, output: Output, samples: tuple[torch.Tensor, ...], seed: int = 0, chunk: int = 16
) -> tuple[dict[str, float], dict[str, float]]:
    """Per parameter: the mean over entries and samples of G_w, and its standard error over samples and their signs.

    The value times the sum of dw^2 over the parameter's entries is the predicted increase of the loss. samples: as for
    `fisher_information`; the signs of each are drawn from `seed`.
    """
    with torch.no_grad():
        shape = output(network, *(s[:1] for s in samples)).shape[1:]
    signs = random_signs((len(samples[0]), *shape), seed).to(samples[0].device)
    return fisher_information(network, signed_sum(output), (*samples, signs), chunk)


def random_signs(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """1 and -1 at random, float32, on the CPU."""
    return 2.0 * torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)) - 1


def signed_sum(output: Output) -> SampleLoss:
    """The loss whose squared gradient is G_w in the mean over signs: of `output`'s batch, and then signs (N, ...)."""

    def loss(call, *batch):
        *batch, signs = batch
        signs = signs.reshape(len(signs), -1)  # (N, P)
        return (output(call, *batch).float().reshape(signs.shape) * signs).sum(1) / signs.shape[1] ** 0.5

    return loss
