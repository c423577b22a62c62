"""Graphs whose weights and activations have 8 bits: made by nncf from noised images, and kept in a sealed file.

The inputs of convolutions and linear layers are quantized, with one range for a whole tensor, and nothing else: sums
along the skips, norms and attention stay in bfloat16. Ranges are those of images noised to the timesteps that a sampler
meets.
"""

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.ddpm.digits import to_model_range, typical_variance
from common.ddpm.noise import NoiseStreams
from common.ddpm.schedule import Schedule
from common.engines.costs import layer_costs
from common.engines.integers import LAYERS, integer_layers, set_integers
from common.engines.openvino import PACKAGES, convert, installed_version, quiet
from common.formats.numbers import IntegerTensor, channel_axes
from common.runtime import distributed, sealed
from common.runtime.device import derive_seed
from common.runtime.sealed import CheckpointError

IMAGES = 300
BATCH = 10
SEED = 0
KIND = "openvino"
ENDS = ("Constant", "Parameter", "Result")


@dataclass(frozen=True)
class Calibration:
    """Noised images x (N, C, H, W) with their timesteps t (N,), and what they are, for those who read of it; variance:
    `typical_variance` of all images."""

    x: torch.Tensor
    t: torch.Tensor
    name: str
    variance: float


def noised_images(images: torch.Tensor, schedule: Schedule, steps: int, name: str) -> Calibration:
    """Some of `images`, uint8 (N, H, W) or (N, C, H, W), always the same, noised evenly to the timesteps that a sampler
    of `steps` steps meets; `name` says which images."""
    generator = torch.Generator().manual_seed(derive_seed(SEED, "calibration"))
    chosen = torch.randperm(len(images), generator=generator)[:IMAGES]
    met = schedule.spaced_timesteps(steps)
    t = torch.tensor([met[i * len(met) // len(chosen)] for i in range(len(chosen))])
    t = t[torch.randperm(len(t), generator=generator)]  # so that each batch has both noise and images in it
    x0 = to_model_range(images[chosen])
    noise = NoiseStreams(derive_seed(SEED, "calibration"), range(len(chosen)), tuple(x0.shape[1:])).draw()
    called = f"{len(chosen)} of {name}, {steps} steps"
    return Calibration(schedule.add_noise(x0, t, noise), t, called, typical_variance(images))


def integer_graph(network: nn.Module, calibration: Calibration, integers: dict[str, IntegerTensor]):
    """The openvino.Model of a network whose convolutions and linear layers have weights and inputs of 8 bits.

    The codes of weights are those of `integers` {weight: ...}, of others the nearest.
    """
    graph = convert(network, calibration.x, calibration.t)
    starts = range(0, len(calibration.x), BATCH)
    batches = [(calibration.x[i : i + BATCH].numpy(), calibration.t[i : i + BATCH].numpy()) for i in starts]
    with quiet(), tqdm(total=len(batches), desc="calibration", unit="batch") as bar:
        import nncf

        nncf.set_log_level(logging.ERROR)

        def batch_of(batch):
            bar.update()
            return batch

        others = {operation.get_type_name() for operation in graph.get_ops()} - {*LAYERS, *ENDS}
        graph = nncf.quantize(
            graph,
            nncf.Dataset(batches, batch_of),
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(types=sorted(others), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    set_integers(graph, network, integers, channel_axes(network))
    return graph


def kept_graph(
    folder: Path, network: nn.Module, weights: str, integers: dict[str, IntegerTensor], calibration: Calibration
):
    """(`integer_graph`, {layer: `layer_costs`}), read from `folder`, or made and kept there.

    weights: hash of the network's weights. A file that is damaged or holds anything else is named in a line, and made
    anew. Several processes share it.
    """
    described = {
        "weights": weights,
        "codes": sealed.hash_tensors({name: of.codes for name, of in integers.items()}),
        "calibration": calibration.name,
        "variance": calibration.variance,
        "versions": [f"{package} {installed_version(package)}" for package in PACKAGES],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    path = folder / f"openvino-int8-{weights[:8]}-{key[:8]}.safetensors"
    distributed.on_first(lambda: _keep(path, network, described, integers, calibration))
    distributed.barrier()
    return _read(path, described)


def _keep(path: Path, network, described: dict, integers, calibration: Calibration) -> None:
    """Makes the file, unless it is there."""
    try:
        _read(path, described)
        return
    except FileNotFoundError:
        pass
    except CheckpointError as error:
        print(f"{error}: the network is calibrated anew")
    graph = integer_graph(network, calibration, integers)
    costs = layer_costs(network, graph, calibration.x, calibration.t, calibration.variance)
    sealed.save(path, KIND, graph_tensors(graph), described | {"costs": costs})


def _read(path: Path, described: dict):
    """What the file holds. Raises FileNotFoundError, or CheckpointError where it is damaged or not `described`."""
    import openvino

    tensors, found = sealed.require(
        path, sealed.load(path, KIND), dict.fromkeys(("graph", "weights"), (torch.uint8, (None,))),
        dict.fromkeys(described, str) | {"versions": list, "variance": float, "costs": dict},
    )  # fmt: skip
    costs = found.pop("costs")
    if found != described or not all(type(value) is float for value in costs.values()):
        raise CheckpointError(f"{path} does not hold the graph that belongs there")
    xml, weights = (tensors[name].numpy() for name in ("graph", "weights"))
    ordered = dict(sorted(costs.items(), key=lambda item: -item[1]))
    try:
        graph = openvino.Core().read_model(xml.tobytes(), openvino.Tensor(weights))
    except RuntimeError:
        raise CheckpointError(f"{path} holds no graph that OpenVINO reads") from None
    if not costs.keys() <= integer_layers(graph).keys():
        raise CheckpointError(f"{path} does not hold the graph that belongs there")
    return graph, ordered


def graph_tensors(graph) -> dict[str, torch.Tensor]:
    """{"graph": the graph as XML, "weights": its constants}, as bytes."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        openvino.serialize(graph, path)
        return {
            name: torch.from_numpy(np.frombuffer(path.with_suffix(suffix).read_bytes(), np.uint8).copy())
            for name, suffix in (("graph", ".xml"), ("weights", ".bin"))
        }
