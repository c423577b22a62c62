"""The engine that samples in place of torch, from its options to the function that predicts the noise."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.ddpm.architecture import schedule_of
from common.ddpm.digits import to_model_range
from common.ddpm.samplers import Denoiser
from common.ddpm.sampling import Prepare, Sampling
from common.engines.calibration import kept_graph, noised_images
from common.engines.costs import most_costly
from common.engines.integers import restore_layers, stored_integers
from common.engines.openvino import (
    PACKAGES,
    convert,
    denoiser,
    has_bfloat16,
    installed_version,
    require_installed,
    sums_saturate,
)
from common.formats.numbers import IntegerTensor
from common.formats.packed import Model

INTEGER_PRECISIONS = ("int8", "mixed")


def is_integer(precision: str) -> bool:
    """Whether products are taken in 8 bits: "int8", "mixed" or "mixed N"."""
    return precision.split()[0] in INTEGER_PRECISIONS


def engine_name(engine: str, precision: str, images: str) -> str:
    """What a row says of the engine: all that its figures depend on beside the weights. images: those that activations
    are calibrated on. Raises UserError where a package is missing."""
    if engine == "torch":
        return engine
    packages = PACKAGES if is_integer(precision) else PACKAGES[:1]
    require_installed(*packages)
    versions = ", ".join(f"{package} {installed_version(package)}" for package in packages)
    if precision == "fp32":
        return versions
    without = "" if has_bfloat16() else ", no bfloat16"
    if not is_integer(precision):
        return versions + without
    return f"{versions} on {images}" + (", sums of 16 bits" if sums_saturate() else "") + without


def warning(precision: str) -> str:
    """What a user should know of a precision on this CPU; mostly empty."""
    if precision == "bf16" and not has_bfloat16():
        return "--precision bf16: this CPU has no bfloat16, so OpenVINO computes in FP32"
    if not is_integer(precision) or not sums_saturate():
        return ""
    return (
        f"--precision {precision}: this CPU has no VNNI, so OpenVINO cuts off sums of 8-bit products at 16 bits; "
        "images may be worse than on other CPUs"
    )


@dataclass(frozen=True)
class OpenVINO:
    """images, uint8 (N, H, W) or (N, C, H, W): what activations are calibrated on, called `name`; folder: where graphs
    of 8 bits are kept."""

    images: torch.Tensor
    name: str
    folder: Path

    def costs(self, model: Model, sampling: Sampling) -> dict[str, float]:
        """{layer: what 8 bits cost there}, the largest first; see `layer_costs`."""
        return self._kept(model.network(), model.sha256, stored_integers(model), sampling)[1]

    def prepare(self, weights: str, integers: dict[str, IntegerTensor]) -> Prepare:
        """For a network of the hash `weights`, of which 8 bits hold `integers` {weight: ...} as they are."""

        def prepare(network: nn.Module, sampling: Sampling, device: torch.device) -> Denoiser:
            return denoiser(self.graph(network, weights, integers, sampling), sampling.precision)

        return prepare

    def graph(self, network: nn.Module, weights: str, integers: dict[str, IntegerTensor], sampling: Sampling):
        """The openvino.Model that samples in `sampling.precision`.

        "mixed" leaves the layers in bfloat16 that `most_costly` names, "mixed N" the N most costly ones.
        """
        if not is_integer(sampling.precision):
            return convert(network, to_model_range(self.images[:2]), torch.zeros(2, dtype=torch.long))
        graph, costs = self._kept(network, weights, integers, sampling)
        restore_layers(graph, network, left_layers(costs, sampling.precision))
        return graph

    def _kept(self, network: nn.Module, weights: str, integers: dict[str, IntegerTensor], sampling: Sampling):
        schedule = schedule_of(network.architecture)
        calibration = noised_images(self.images, schedule, sampling.steps, self.name)
        return kept_graph(self.folder, network, weights, integers, calibration)


def left_layers(costs: dict[str, float], precision: str) -> list[str]:
    """The layers that "int8", "mixed" or "mixed N" leave out of 8 bits; `costs` begins with the most costly."""
    name, _, number = precision.partition(" ")
    if name == "int8":
        return []
    return list(costs)[: int(number)] if number else most_costly(costs)
