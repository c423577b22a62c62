"""What the names of the network's tensors say: their layer, and which of them the strategies choose among."""

from collections.abc import Iterable


def layer_of(name: str) -> str:
    """The layer of a tensor: "layer1".."layer6", or the convolution before or after them."""
    return name.split(".", 1)[0]


def layer_weights(names: Iterable[str]) -> list[str]:
    """The weights (no biases) of layers 1 to 6: the 58 tensors that the published rules choose among."""
    return [name for name in names if name.startswith("layer") and name.endswith(".weight")]


def is_norm(name: str) -> bool:
    """Whether a tensor belongs to a GroupNorm."""
    return ".norm" in name


def by_layer(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """{layer: {name: value}}, in the order of `values`."""
    layers: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        layers.setdefault(layer_of(name), {})[name] = value
    return layers
