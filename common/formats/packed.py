"""A model: a network's weights as a file stores them, each in its format, and what sampling needs to know of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from common.ddpm.architecture import Architecture, build, build_plain, described
from common.ddpm.digits import DATA_RANGE
from common.ddpm.pipelines import DiffusersConfig
from common.ddpm.unet import load_tensors
from common.formats import entropy
from common.formats.numbers import (
    IntegerTensor,
    channel_axes,
    pack,
    quantize_integer,
    stored_bytes,
    stored_format,
    stored_parts,
    unpack,
)
from common.presets import FORMATS, UNetConfig
from common.runtime import sealed
from common.runtime.sealed import CheckpointError

Quantizer = Callable[[str, torch.Tensor, str, int], IntegerTensor]  # of (tensor's name, weight, format, axis)

MIB = 2**20
MOST_CODED_WEIGHTS = 2**28  # 1 GiB as FP32: few bytes of entropy coding may stand for any number

# What a file of a model holds, and of what types JSON has it.
_CODED = {1: "entropy", 2: "entropy 2", 3: "entropy 3"}  # by version of `common.formats.entropy`, for all tensors
_HELD = {"architecture": dict, "data_range": list, "weights_sha256": str, "about": dict}
_ARCHITECTURE = {
    "channels": list,
    "groups": int,
    "heads": int,
    "attention_layers": list,
    "dropout": float,
    "timesteps": int,
}
_ABOUT = {"label": str, "preset": str, "digits_seen": int, "training": dict, "loss_curve": list, "baseline": str}


@dataclass(frozen=True)
class Model:
    """stored: packed tensors by name, scales of integers beside them as "name:scale"; formats: that of each tensor;
    metadata: label, preset, training and so on, as JSON holds it."""

    config: Architecture
    stored: dict[str, torch.Tensor]
    formats: dict[str, str]
    metadata: dict

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """The FP32 values that are sampled from: what the stored tensors unpack to."""
        if self.is_entropy_coded:
            return entropy.decode(self.stored, {name: s for name, (s, _) in tensor_shapes(self.config).items()})
        return {
            name: unpack(_parts(self.stored, name), self.formats[name], shape, axis)
            for name, (shape, axis) in tensor_shapes(self.config).items()
        }

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights as they are sampled from; of a network of diffusers also of its config and its noise,
        since the same weights may come with another scheduler."""
        weights = sealed.hash_tensors(self.state)
        if isinstance(self.config, UNetConfig):
            return weights
        return hashlib.sha256(json.dumps([weights, self.config.unet, self.config.noise]).encode()).hexdigest()

    @property
    def is_baseline(self) -> bool:
        """Whether strategies may start from it: not the result of one, and all FP32."""
        return "strategy" not in self.metadata and set(self.formats.values()) == {"fp32"}

    @property
    def is_entropy_coded(self) -> bool:
        """Whether all tensors are coded together (`common.formats.entropy`)."""
        return set(self.formats.values()) == {"entropy"}

    def network(self) -> nn.Module:
        """The network with these weights, in evaluation mode."""
        network = build(self.config)
        load_tensors(network, self.state)
        return network.eval()

    def size_mib(self) -> float:
        """MiB of the tensors as stored; the file adds its header."""
        return sum(tensor.nbytes for tensor in self.stored.values()) / MIB

    def quantize(self, names: Iterable[str], fmt: str, metadata: dict, quantizer: Quantizer | None = None) -> "Model":
        """This model with `names` quantized to `fmt` (1-D tensors to fp16 at the lowest), to the nearest integers or
        those of the `quantizer`."""
        shapes, formats = tensor_shapes(self.config), dict(self.formats)
        stored = dict(self.stored)
        for name in names:
            shape, axis = shapes[name]
            formats[name] = stored_format(fmt, shape)
            stored.pop(f"{name}:scale", None)
            quantize = partial(quantizer, name) if quantizer else quantize_integer
            stored |= _named(name, pack(self.state[name], formats[name], axis, quantize))
        return Model(self.config, stored, formats, {**self.metadata, **metadata})


def full_precision(config: Architecture, state: dict[str, torch.Tensor], metadata: dict) -> Model:
    """A model whose tensors are all stored as FP32."""
    stored = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    return Model(config, stored, dict.fromkeys(state, "fp32"), metadata)


@lru_cache(maxsize=8)  # the network that is built takes longer than reading a file
def tensor_shapes(config: Architecture) -> Mapping[str, tuple[torch.Size, int]]:
    """{name: (shape, output-channel axis)} of the network's tensors; builds no weights."""
    with torch.device("meta"):
        network = build(config)
    axes = channel_axes(network)
    return MappingProxyType({name: (tensor.shape, axes[name]) for name, tensor in network.state_dict().items()})


def weights_of(config: Architecture) -> int:
    """How many numbers the network's tensors hold."""
    return sum(shape.numel() for shape, _ in tensor_shapes(config).values())


def size_mib(config: Architecture, formats: dict[str, str]) -> float:
    """MiB of a model from its shapes alone; tensors that `formats` does not name are FP32."""
    shapes = tensor_shapes(config)
    return sum(stored_bytes(s, stored_format(formats.get(n, "fp32"), s), axis) for n, (s, axis) in shapes.items()) / MIB


def save_model(path: str | Path, model: Model) -> None:
    """Writes the packed model: each tensor in its format, and all that sampling needs."""
    sealed.save(path, "model", model.stored, _metadata(model, model.sha256))


def file_bytes(model: Model) -> int:
    """Bytes of the file that `save_model` writes; unpacks nothing."""
    return len(sealed.seal("model", model.stored, _metadata(model, "0" * 64)))


def _metadata(model: Model, sha256: str) -> dict:
    return {
        "architecture": described(model.config),
        "formats": _CODED[entropy.version_of(model.stored)] if model.is_entropy_coded else model.formats,
        "data_range": DATA_RANGE,
        "weights_sha256": sha256,
        "about": model.metadata,
    }


def _config_of(described: dict) -> Architecture:
    """What `described` was given, checked. Raises ValueError."""
    if "unet" in described:
        sealed.require_metadata(described, {"unet": dict, "scheduler": dict, "pipeline": str})
        return DiffusersConfig.of(**described)
    optional = {"output_bias": int, "output_contrast": bool}
    sealed.require_metadata(described, _ARCHITECTURE | {key: of for key, of in optional.items() if key in described})
    return UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in described.items()})


def load_model(path: str | Path) -> Model:
    """Reads what `save_model` wrote, and checks what it claims before memory is taken for it.

    Raises FileNotFoundError, or CheckpointError for any other file.
    """
    stored, metadata = sealed.load(path, "model")
    try:
        model = _model_of(stored, metadata)
        sha256 = model.sha256
        for name, tensor in model.state.items():
            if not tensor.isfinite().all():
                raise ValueError(f"tensor {name} holds numbers that are not finite")
    except ValueError as error:
        raise CheckpointError(f"{path} holds no model that can be used: {error}; make it anew") from None
    if sha256 != metadata["weights_sha256"]:
        raise CheckpointError(f"{path}: the unpacked weights do not fit their hash; make it anew")
    return model


def load_plain(path: str | Path) -> nn.Module:
    """The network of a file as its own library has it: a UNet, or a UNet2DModel of diffusers. Raises as `load_model`
    does."""
    model = load_model(path)
    network = build_plain(model.config)
    load_tensors(network, model.state)
    return network.eval()


def _model_of(stored: dict[str, torch.Tensor], metadata: dict) -> Model:
    """The model that a file's tensors and metadata describe, none of it unpacked. Raises ValueError."""
    formats = metadata.get("formats")
    coded = formats in _CODED.values()
    sealed.require_metadata(metadata, _HELD | {"formats": str if coded else dict})
    about = metadata["about"]
    sealed.require_metadata(about, {"label": str} | {key: _ABOUT.get(key, type(about[key])) for key in about})
    if not about["label"].isprintable() or len(about["label"]) > 200:  # it stands in tables and names files
        raise ValueError("its label is not one short line")
    if metadata["data_range"] != list(DATA_RANGE):
        raise ValueError(f"its images are not of the range {DATA_RANGE}")
    config = _config_of(metadata["architecture"])
    shapes = tensor_shapes(config)
    if coded:
        if formats != _CODED[entropy.version_of(stored)]:
            raise ValueError(f"its tensors are not of the format {formats}")
        if (weights := weights_of(config)) > MOST_CODED_WEIGHTS:
            raise ValueError(f"{weights} weights, more than the {MOST_CODED_WEIGHTS} that are decoded")
        return Model(config, stored, dict.fromkeys(shapes, "entropy"), about)
    sealed.require_metadata(formats, dict.fromkeys(shapes, str))
    expected = {}
    for name, (shape, axis) in shapes.items():
        if formats[name] not in FORMATS or stored_format(formats[name], shape) != formats[name]:
            raise ValueError(f"tensor {name} has format {sealed.shorten(formats[name])}")
        expected |= _named(name, stored_parts(shape, formats[name], axis))
    sealed.require_tensors(stored, expected)
    return Model(config, stored, formats, about)


def _named(name: str, parts: dict) -> dict:
    """`parts` of a tensor under the names that a file gives them."""
    return {f"{name}:{part}".removesuffix(":"): tensor for part, tensor in parts.items()}


def _parts(stored: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    parts = {"": stored[name]}
    return parts | {"scale": stored[f"{name}:scale"]} if f"{name}:scale" in stored else parts
